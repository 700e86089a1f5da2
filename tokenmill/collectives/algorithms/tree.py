"""The double binary tree: two trees with half the vector each, so that every rank's link is busy.

Sanders, Speck and Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan"
(2009). An in-order tree over an odd number of places has every second place as a leaf, the first
and the last among them. For p even, place 0 stands above a tree of the others. The second tree is
the first one mirrored (p even) or shifted by one (p odd), so a place that is an inner node of one
is a leaf of the other, and nobody sends more than 2n. The path from a leaf to the root has
ceil(log2 p) links, for odd p one fewer.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tokenmill.collectives.ranges import Ranges, joined, part
from tokenmill.collectives.writer import Scope, Writer

TREES = (0, 1)


@dataclass(frozen=True, slots=True)
class Node:
    """A place in a tree: its parent (-1 at the root) and its children, nearer to place 0 first."""

    parent: int
    children: tuple[int, ...]


def node(place: int, size: int, tree: int) -> Node:
    """Where a place of `size` stands in the first or in the second tree."""
    if tree == 0:
        return _first_tree(place, size)
    if size % 2 == 0:
        return _renamed(_first_tree(size - 1 - place, size), lambda other: size - 1 - other)
    return _renamed(_first_tree((place - 1) % size, size), lambda other: (other + 1) % size)


def _renamed(found: Node, name: Callable[[int], int]) -> Node:
    parent = name(found.parent) if found.parent >= 0 else -1
    return Node(parent, tuple(sorted(name(child) for child in found.children)))


def _first_tree(place: int, size: int) -> Node:
    if size % 2 == 1:
        found = _in_order(place + 1, size)
        return Node(found.parent - 1, tuple(child - 1 for child in found.children))
    if place == 0:
        return Node(-1, (_in_order_root(size - 1),))
    return _in_order(place, size - 1)  # the root of this tree has parent 0


def _in_order_root(count: int) -> int:
    return 1 << (count.bit_length() - 1)


def _in_order(index: int, count: int) -> Node:
    """In the tree of 1 to `count` (odd): parent, 0 at the root, and children."""
    low = index & -index
    parent = (index ^ low) | (low << 1)
    if parent > count:
        parent = index ^ low
    if low == 1:
        return Node(parent, ())
    step = low >> 1
    right = step
    while index + right > count:
        right >>= 1
    return Node(parent, (index - step, index + right))


def _half(scope: Scope, tree: int) -> Ranges:
    return joined([part(scope.region, len(TREES), tree)])


def all_reduce(scope: Scope, write: Writer) -> None:
    """Up both trees, then down both: at most 2 ceil(log2 p) steps."""
    nodes = [node(scope.place, scope.size, tree) for tree in TREES]
    for tree, here in zip(TREES, nodes, strict=True):
        _write_up(write, here, _half(scope, tree), tree)
    for tree, here in zip(TREES, nodes, strict=True):
        _write_down(write, here, _half(scope, tree), tree)


def reduce(scope: Scope, write: Writer) -> None:
    """Up both trees of the other places, to the root above them."""
    for tree in TREES:
        _write_up(write, _rooted_node(scope, tree), _half(scope, tree), tree)


def broadcast(scope: Scope, write: Writer) -> None:
    """From the root down both trees of the other places."""
    for tree in TREES:
        _write_down(write, _rooted_node(scope, tree), _half(scope, tree), tree)


def _rooted_node(scope: Scope, tree: int) -> Node:
    """Trees of all places but the root, which is the parent of both."""
    size, root = scope.size, scope.root
    if size == 1:
        return Node(-1, ())
    distance = (scope.place - root) % size

    def rename(other: int) -> int:
        return (other + 1 + root) % size  # -1 becomes the root

    if distance == 0:
        top = next(i for i in range(size - 1) if node(i, size - 1, tree).parent < 0)
        return Node(-1, (rename(top),))
    found = node(distance - 1, size - 1, tree)
    return Node(rename(found.parent), tuple(rename(child) for child in found.children))


def _write_up(write: Writer, here: Node, ranges: Ranges, lane: int) -> None:
    for child in here.children:
        write.recv_reduce(child, ranges, lane=lane)
    if here.parent >= 0:
        write.send(here.parent, ranges, lane=lane)


def _write_down(write: Writer, here: Node, ranges: Ranges, lane: int) -> None:
    if here.parent >= 0:
        write.recv(here.parent, ranges, lane=lane)
    for child in here.children:
        write.send(child, ranges, lane=lane)

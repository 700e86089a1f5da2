"""Rings, and the chains that broadcast and reduce are in them.

A ring of L places has L blocks; a block travels once around it and grows by one contribution a
step. Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations"
(2009).
"""

from collections.abc import Callable
from dataclasses import dataclass

from tokenmill.collectives.ranges import Ranges
from tokenmill.collectives.writer import Scope, Writer


@dataclass(frozen=True, slots=True)
class Ring:
    """A ring as one of its places sees it: position `index` of `length`, and the neighbours."""

    index: int
    length: int
    next_place: int
    previous_place: int
    lane: int = 0


def make_ring(
    index: int,
    length: int,
    place: Callable[[int], int],
    lane: int = 0,
    *,
    is_reversed: bool = False,
) -> Ring:
    """The ring of `place(0)` to `place(length - 1)`; one that is reversed runs the other way."""
    ahead, behind = place((index + 1) % length), place((index - 1) % length)
    if is_reversed:
        return Ring(-index % length, length, behind, ahead, lane)
    return Ring(index, length, ahead, behind, lane)


def write_reduce_scatter(write: Writer, ring: Ring, block: Callable[[int], Ranges]) -> None:
    """L - 1 steps; then block(index) is complete. `block` takes a position of the ring."""
    for step in range(1, ring.length):
        write.send(ring.next_place, block((ring.index - step) % ring.length), lane=ring.lane)
        gone = block((ring.index - step - 1) % ring.length)
        write.recv_reduce(ring.previous_place, gone, lane=ring.lane)


def write_all_gather(write: Writer, ring: Ring, block: Callable[[int], Ranges]) -> None:
    """L - 1 steps, from block(index) to all blocks."""
    for step in range(ring.length - 1):
        write.send(ring.next_place, block((ring.index - step) % ring.length), lane=ring.lane)
        come = block((ring.index - step - 1) % ring.length)
        write.recv(ring.previous_place, come, lane=ring.lane)


def _ring_of_all(scope: Scope) -> Ring:
    return make_ring(scope.place, scope.size, lambda index: index)


def all_reduce(scope: Scope, write: Writer) -> None:
    """Reduce-scatter, then all-gather: 2(p-1) steps, 2(p-1)n/p sent."""
    blocks, ring = scope.blocks(), _ring_of_all(scope)
    write_reduce_scatter(write, ring, blocks)
    write_all_gather(write, ring, blocks)


def reduce_scatter(scope: Scope, write: Writer) -> None:
    write_reduce_scatter(write, _ring_of_all(scope), scope.blocks())


def all_gather(scope: Scope, write: Writer) -> None:
    write_all_gather(write, _ring_of_all(scope), scope.blocks())


def broadcast(scope: Scope, write: Writer) -> None:
    """A chain from the root: p + k - 2 steps for k slices."""
    distance = (scope.place - scope.root) % scope.size
    write_chain_broadcast(write, _ring_of_all(scope), distance, scope.whole)


def reduce(scope: Scope, write: Writer) -> None:
    """A chain that ends at the root."""
    distance = (scope.place - scope.root) % scope.size
    write_chain_reduce(write, _ring_of_all(scope), distance, scope.whole)


def write_chain_broadcast(write: Writer, ring: Ring, distance: int, ranges: Ranges) -> None:
    """Along the ring, from the place at distance 0."""
    if distance > 0:
        write.recv(ring.previous_place, ranges, lane=ring.lane)
    if distance < ring.length - 1:
        write.send(ring.next_place, ranges, lane=ring.lane)


def write_chain_reduce(write: Writer, ring: Ring, distance: int, ranges: Ranges) -> None:
    """Against the ring, to the place at distance 0."""
    if distance < ring.length - 1:
        write.recv_reduce(ring.next_place, ranges, lane=ring.lane)
    if distance > 0:
        write.send(ring.previous_place, ranges, lane=ring.lane)

"""Who waits for whom over all ranks: messages, deadlocks, and the longest chain of messages."""

from collections import deque
from typing import NamedTuple

from tokenmill.collectives.legality import fail
from tokenmill.collectives.program import Chunk, Message, Program, Send


class Pair(NamedTuple):
    """A message: rank and step at both ends; `previous` is the one before on its lane, or -1."""

    source: tuple[int, int]
    target: tuple[int, int]
    previous: int


def match(program: Program) -> list[Pair]:
    """Every send with its receive. Raises ProofError where one is alone, or sizes differ."""
    ends: dict[tuple[int, int, int], tuple[list[int], list[int]]] = {}
    for here in program.ranks:
        for index, step in enumerate(here.steps):
            if isinstance(step, Send):
                ends.setdefault((here.rank, step.peer, step.tag), ([], []))[0].append(index)
            elif isinstance(step, Message):
                ends.setdefault((step.peer, here.rank, step.tag), ([], []))[1].append(index)
    pairs = []
    for (source, target, tag), (sends, recvs) in ends.items():
        if len(sends) > len(recvs):
            raise fail(
                source, sends[len(recvs)], f"rank {target} does not receive this (tag {tag})"
            )
        if len(recvs) > len(sends):
            raise fail(target, recvs[len(sends)], f"rank {source} does not send this (tag {tag})")
        previous = -1
        for send, recv in zip(sends, recvs, strict=True):
            _check_sizes(program, (source, send), (target, recv))
            pairs.append(Pair((source, send), (target, recv), previous))
            previous = len(pairs) - 1
    return pairs


def _check_sizes(program: Program, source: tuple[int, int], target: tuple[int, int]) -> None:
    sent = _chunk(program, *source).count
    wanted = _chunk(program, *target).count
    if sent != wanted:
        message = f"rank {target[0]} expects {wanted} elements in step {target[1]}, {sent} are sent"
        raise fail(*source, message)


def _chunk(program: Program, rank: int, index: int) -> Chunk:
    step = program.ranks[rank].steps[index]
    assert isinstance(step, Message)
    return step.chunk


def depths(program: Program, pairs: list[Pair]) -> list[list[int]]:
    """For each rank and step, the messages on the longest chain up to its end. Raises ProofError if
    the graph has a cycle.

    A message is one node of the graph, and so is every step without one. In the chain a message
    waits for what its send depends on and for the one before it on its lane; that its receiver may
    still be busy does not count.
    """
    nodes, ends = _nodes(program, pairs)
    followers: list[list[int]] = [[] for _ in ends]
    waits = [0] * len(ends)

    def add(before: int, after: int) -> None:
        followers[before].append(after)
        waits[after] += 1

    for here in program.ranks:
        own = nodes[here.rank]
        for index, step in enumerate(here.steps):
            for before in step.after:
                add(own[before], own[index])
    for number, pair in enumerate(pairs):
        if pair.previous >= 0:
            add(pair.previous, number)

    depth = [[0] * len(here.steps) for here in program.ranks]
    ready = deque(node for node, count in enumerate(waits) if not count)
    num_done = 0
    while ready:
        node = ready.popleft()
        num_done += 1
        for rank, index in ends[node]:
            after = program.ranks[rank].steps[index].after
            depth[rank][index] = max((depth[rank][before] for before in after), default=0)
        if node < len(pairs):
            _deepen(depth, pairs, node)
        for follower in followers[node]:
            waits[follower] -= 1
            if not waits[follower]:
                ready.append(follower)
    if num_done < len(ends):
        stuck = next(node for node, count in enumerate(waits) if count)
        raise fail(*ends[stuck][0], "deadlock without buffers: it waits for itself")
    return depth


def _nodes(
    program: Program, pairs: list[Pair]
) -> tuple[list[list[int]], list[tuple[tuple[int, int], ...]]]:
    """The node of each step, and the steps of each node; those of messages come first."""
    nodes = [[-1] * len(here.steps) for here in program.ranks]
    ends: list[tuple[tuple[int, int], ...]] = []
    for number, pair in enumerate(pairs):
        ends.append((pair.source, pair.target))
        for rank, index in ends[-1]:
            nodes[rank][index] = number
    for rank, own in enumerate(nodes):
        for index, number in enumerate(own):
            if number < 0:
                own[index] = len(ends)
                ends.append(((rank, index),))
    return nodes, ends


def _deepen(depth: list[list[int]], pairs: list[Pair], number: int) -> None:
    """A send starts one step after the one before on its lane, and its message takes a step."""
    (source, send), (target, recv), previous = pairs[number]
    if previous >= 0:
        rank, index = pairs[previous].source
        depth[source][send] = max(depth[source][send], depth[rank][index] + 1)
    depth[target][recv] = max(depth[target][recv], depth[source][send] + 1)

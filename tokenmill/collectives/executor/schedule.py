"""A rank's program as the executor walks it: numbers instead of objects, worked out once."""

from dataclasses import dataclass

from tokenmill.collectives.program import Buffer, Chunk, Copy, Message, RankProgram, Recv, Send
from tokenmill.collectives.ranges import Ranges

SEND, RECV, RECV_REDUCE, COPY, REDUCE = range(5)


@dataclass(frozen=True, slots=True)
class Action:
    """A step. Ranges are elements of `buffer`; a copy or reduce reads `source`."""

    kind: int
    buffer: str
    ranges: Ranges
    count: int
    peer: int
    tag: int
    source: str
    source_ranges: Ranges


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a run of one rank's program needs to know; several runs may share it."""

    buffers: tuple[Buffer, ...]
    actions: tuple[Action, ...]
    waits: tuple[int, ...]
    """How many things must happen before each step starts."""
    followers: tuple[tuple[int, ...], ...]
    """The steps that wait for each to be complete."""
    next_on_lane: tuple[int, ...]
    """The step that waits for each to start, so that messages of a lane keep their order; or -1."""
    send_peers: tuple[int, ...]
    num_received: dict[int, int]
    """Messages that come from each peer."""
    first: tuple[int, ...]
    """Steps that wait for nothing."""


def make_schedule(program: RankProgram) -> Schedule:
    steps = program.steps
    waits = [len(step.after) for step in steps]
    followers: list[list[int]] = [[] for _ in steps]
    for index, step in enumerate(steps):
        for before in step.after:
            followers[before].append(index)
    next_on_lane, num_received = [-1] * len(steps), dict[int, int]()
    for lane in program.lanes():
        for earlier, later in zip(lane.steps, lane.steps[1:], strict=False):
            next_on_lane[earlier] = later
            waits[later] += 1
        if not lane.is_send:
            num_received[lane.peer] = num_received.get(lane.peer, 0) + len(lane.steps)
    return Schedule(
        buffers=program.buffers,
        actions=tuple(_action(step) for step in steps),
        waits=tuple(waits),
        followers=tuple(map(tuple, followers)),
        next_on_lane=tuple(next_on_lane),
        send_peers=tuple(sorted({lane.peer for lane in program.lanes() if lane.is_send})),
        num_received=num_received,
        first=tuple(index for index, count in enumerate(waits) if not count),
    )


def _action(step: object) -> Action:
    if isinstance(step, Message):
        kind = SEND if isinstance(step, Send) else RECV if isinstance(step, Recv) else RECV_REDUCE
        chunk = step.chunk
        return Action(kind, chunk.buffer, chunk.ranges, chunk.count, step.peer, step.tag, "", ())
    source, target = _ends(step)
    kind = COPY if isinstance(step, Copy) else REDUCE
    return Action(
        kind, target.buffer, target.ranges, target.count, -1, 0, source.buffer, source.ranges
    )


def _ends(step: object) -> tuple[Chunk, Chunk]:
    source, target = step.source, step.target  # type: ignore[attr-defined]
    assert isinstance(source, Chunk)
    assert isinstance(target, Chunk)
    return source, target

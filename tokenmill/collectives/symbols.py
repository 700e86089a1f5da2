"""A run on symbols: what each element holds is a set of contributions instead of a number."""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from tokenmill.collectives.legality import fail
from tokenmill.collectives.program import (
    Chunk,
    Copy,
    Message,
    Program,
    RankProgram,
    Recv,
    RecvReduce,
    Send,
    Step,
)
from tokenmill.collectives.segments import Segments
from tokenmill.collectives.task import Task


class Sum(NamedTuple):
    """What an element holds: contributions (a bit for each rank), and which element of theirs."""

    ranks: int
    shift: int
    """Number of the element at the contributors, less that of the element here."""
    is_ordered: bool


class _Run(NamedTuple):
    """Neighbours in a message, `length` elements that hold the same sum; `origin` is the first."""

    length: int
    ranks: int
    origin: int
    is_ordered: bool


class Symbols:
    """What all ranks hold, and the effect of each step on it."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.memory = [_initial(program.task, here) for here in program.ranks]
        """For each rank its buffers by name."""
        self.heard = [[0] * len(here.steps) for here in program.ranks]
        """For each step that is done, the ranks (bits) that had entered for certain by then."""
        self._mail: dict[tuple[int, int, int], deque[tuple[list[_Run], int]]] = {}

    def can_do(self, rank: int, step: Step) -> bool:
        """Whether the message of a step is there; others can always be done."""
        if not isinstance(step, Recv | RecvReduce):
            return True
        return bool(self._mail.get((step.peer, rank, step.tag)))

    def do(self, here: RankProgram, index: int) -> None:
        """Do a step for which `can_do`. Raises ProofError where it adds what must not be added."""
        step, rank, known = here.steps[index], here.rank, 1 << here.rank
        for before in step.after:
            known |= self.heard[rank][before]
        if isinstance(step, Send):
            message = list(self._read(rank, step.chunk)), known
            self._mail.setdefault((rank, step.peer, step.tag), deque()).append(message)
        elif isinstance(step, Message):
            runs, told = self._mail[step.peer, rank, step.tag].popleft()
            known |= told
            self._write(here, index, step.chunk, runs, is_new=isinstance(step, Recv))
        else:
            runs = list(self._read(rank, step.source))
            self._write(here, index, step.target, runs, is_new=isinstance(step, Copy))
        self.heard[rank][index] = known

    def _read(self, rank: int, chunk: Chunk) -> Iterator[_Run]:
        memory = self.memory[rank][chunk.buffer]
        for bounds in chunk.ranges:
            for start, stop, held in memory.read(*bounds):
                yield _Run(stop - start, held.ranks, start + held.shift, held.is_ordered)

    def _write(
        self, here: RankProgram, index: int, chunk: Chunk, runs: list[_Run], *, is_new: bool
    ) -> None:
        memory = self.memory[here.rank][chunk.buffer]
        is_wide = here.buffer(chunk.buffer).is_wide
        for start, stop, run in _aligned(chunk, runs):
            new = Sum(run.ranks, run.origin - start, run.is_ordered)
            if is_new:
                memory.write(start, stop, new)
                continue
            for a, b, held in list(memory.read(start, stop)):
                message = _refusal(held, new)
                if message:
                    raise fail(here.rank, index, message)
                ranks = held.ranks | new.ranks
                is_ordered = is_wide and held.is_ordered and new.ranks == held.ranks + 1
                memory.write(a, b, Sum(ranks, new.shift, is_ordered))


def _aligned(chunk: Chunk, runs: list[_Run]) -> Iterator[tuple[int, int, _Run]]:
    """The runs of a message laid over the ranges of a chunk: start, stop, and what comes there."""
    pending = iter(runs)
    run = next(pending)
    for start, stop in chunk.ranges:
        while start < stop:
            count = min(run.length, stop - start)
            yield start, start + count, run
            start += count
            if count == run.length:
                run = next(pending, run)
            else:
                run = run._replace(length=run.length - count, origin=run.origin + count)


def _refusal(held: Sum, new: Sum) -> str | None:
    """Why two sums must not be added."""
    if not held.ranks or not new.ranks:
        return "it reduces elements that hold nothing"
    if held.ranks & new.ranks:
        return f"the contribution of rank {lowest(held.ranks & new.ranks)} comes in twice"
    if held.shift != new.shift:
        return "it adds elements of different numbers"
    return None


def _initial(task: Task, here: RankProgram) -> dict[str, Segments[Sum]]:
    """What the buffers hold before: the caller's own contributions, else nothing."""
    nothing, own = Sum(0, 0, False), Sum(1 << here.rank, 0, here.rank == 0)
    memory = {buffer.name: Segments(buffer.count, nothing) for buffer in here.buffers}
    if task.op == "barrier":
        return memory
    name = "input" if task.op == "all_to_all" else "data"
    start, stop = 0, memory[name].count if name in memory else 0
    if task.op == "all_gather":
        start, stop = task.block(here.rank)
    has_some = task.op not in ("broadcast", "send_recv") or here.rank == task.root
    if has_some and start < stop:
        memory[name].write(start, stop, own)
    return memory


def lowest(ranks: int) -> int:
    """The first rank in a set."""
    return (ranks & -ranks).bit_length() - 1

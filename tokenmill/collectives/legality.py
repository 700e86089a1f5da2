"""What every program must satisfy before its meaning is asked for: sound chunks, and no races.

A race is a pair of steps of one rank that touch the same elements, one of them writing, without a
chain of dependencies from one to the other: run by dependencies, they could come in either order.
"""

from collections.abc import Iterator
from itertools import pairwise

from tokenmill.collectives.program import (
    Chunk,
    Copy,
    Message,
    Program,
    RankProgram,
    Recv,
    RecvReduce,
    Reduce,
    Send,
    Step,
)
from tokenmill.collectives.segments import Segments


class ProofError(ValueError):
    """A program does not do its task, or may fail to; says the rank and the step."""


def fail(rank: int, index: int, message: str) -> ProofError:
    return ProofError(f"rank {rank}, step {index}: {message}")


def check_program(program: Program) -> None:
    """Raise ProofError where a step is malformed or races with another."""
    if [here.rank for here in program.ranks] != list(range(program.task.ranks)):
        raise ProofError(f"the program must have the ranks 0 to {program.task.ranks - 1} in order")
    for here in program.ranks:
        _check_steps(here, program.task.ranks)
        _check_races(here)


def reads_of(step: Step) -> tuple[Chunk, ...]:
    """What a step reads and does not write."""
    if isinstance(step, Send):
        return (step.chunk,)
    return (step.source,) if isinstance(step, Copy | Reduce) else ()


def writes_of(step: Step) -> tuple[Chunk, ...]:
    """What a step writes."""
    if isinstance(step, Recv | RecvReduce):
        return (step.chunk,)
    return (step.target,) if isinstance(step, Copy | Reduce) else ()


def _check_steps(here: RankProgram, num_ranks: int) -> None:
    buffers = {buffer.name: buffer for buffer in here.buffers}
    if len(buffers) < len(here.buffers):
        raise ProofError(f"rank {here.rank}: two buffers have the same name")
    for index, step in enumerate(here.steps):
        for message in _faults(step, index, here.rank, num_ranks):
            raise fail(here.rank, index, message)
        for chunk in (*reads_of(step), *writes_of(step)):
            buffer = buffers.get(chunk.buffer)
            if buffer is None:
                raise fail(here.rank, index, f"there is no buffer '{chunk.buffer}'")
            if chunk.ranges[-1][1] > buffer.count:
                raise fail(here.rank, index, f"the chunk goes beyond the end of '{chunk.buffer}'")
        if isinstance(step, Send) and buffers[step.chunk.buffer].is_wide:
            raise fail(here.rank, index, "a wide buffer never travels")


def _faults(step: Step, index: int, rank: int, num_ranks: int) -> Iterator[str]:
    if any(not 0 <= before < index for before in step.after):
        yield "it may wait for earlier steps only"
    for chunk in (*reads_of(step), *writes_of(step)):
        if not chunk.ranges or any(start >= stop for start, stop in chunk.ranges):
            yield "a chunk is empty"
        elif chunk.ranges[0][0] < 0 or any(a[1] > b[0] for a, b in pairwise(chunk.ranges)):
            yield "the ranges of a chunk must ascend without overlap"
    if isinstance(step, Message):
        if step.peer == rank or not 0 <= step.peer < num_ranks:
            yield f"it has no peer {step.peer}"
    elif step.source.count != step.target.count:
        yield f"{step.source.count} elements do not fit into {step.target.count}"


def _check_races(here: RankProgram) -> None:
    """Each step must come after the last writers of what it touches, a writer after readers too."""
    ancestors: list[int] = []  # a bit for each earlier step
    state = {
        buffer.name: Segments[tuple[int, tuple[int, ...]]](buffer.count, (-1, ()))
        for buffer in here.buffers
    }
    for index, step in enumerate(here.steps):
        before = 0
        for earlier in step.after:
            before |= ancestors[earlier] | 1 << earlier
        ancestors.append(before)
        for chunk in reads_of(step):
            segments = state[chunk.buffer]
            for start, stop in chunk.ranges:
                for a, b, (writer, readers) in list(segments.read(start, stop)):
                    _check_after(here.rank, index, before, (writer,))
                    segments.write(a, b, (writer, (*readers, index)))
        for chunk in writes_of(step):
            segments = state[chunk.buffer]
            for start, stop in chunk.ranges:
                for _, _, (writer, readers) in segments.read(start, stop):
                    _check_after(here.rank, index, before, (writer, *readers))
                segments.write(start, stop, (index, ()))


def _check_after(rank: int, index: int, before: int, earlier: tuple[int, ...]) -> None:
    for other in earlier:
        if other == index:
            raise fail(rank, index, "it reads what it writes")
        if other >= 0 and not before >> other & 1:
            raise fail(rank, index, f"it races with step {other}")

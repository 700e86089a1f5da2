"""A small program step by step: who sends what to whom, and what everyone holds after it.

Step t is the t-th message of a chain: all messages of which the longest chain up to them has t.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from tokenmill.collectives.chains import Pair, depths, match
from tokenmill.collectives.program import Message, Program, RecvReduce
from tokenmill.collectives.symbols import Sum, Symbols


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A message; `parts` are the numbers of the parts of the receiver's vector that it changes."""

    source: int
    target: int
    parts: tuple[int, ...]
    count: int
    """Elements."""
    is_reduced: bool


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One step: its messages, and what each rank holds of each part after it.

    A part that holds nothing is an empty set; one whose elements differ has the ranks of the first.
    """

    number: int
    messages: tuple[Sent, ...]
    holdings: tuple[tuple[frozenset[int], ...], ...]
    """For each rank, for each of its parts, the contributors."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The frames; the first, number 0, is how it begins. `parts` are the ranges of `buffer`."""

    program: Program
    buffer: str
    parts: tuple[tuple[int, int], ...]
    frames: tuple[Frame, ...]


def trace(program: Program) -> Trace:
    """Run a program on symbols, step by step. Raises ProofError where it cannot be run."""
    return _Tracer(program).run()


class _Tracer:
    def __init__(self, program: Program) -> None:
        self._program = program
        self._pairs = match(program)
        self._depth = depths(program, self._pairs)
        op = program.task.op
        self._buffer = {"all_to_all": "output", "barrier": "token"}.get(op, "data")
        self._parts = _parts(program, self._buffer)
        self._symbols = Symbols(program)

    def run(self) -> Trace:
        last = max((max(steps, default=0) for steps in self._depth), default=0)
        frames = []
        for number in range(last + 1):
            self._do_steps(number)
            messages = tuple(sorted(self._messages(number), key=_ends))
            frames.append(Frame(number=number, messages=messages, holdings=self._holdings()))
        return Trace(
            program=self._program, buffer=self._buffer, parts=self._parts, frames=tuple(frames)
        )

    def _do_steps(self, number: int) -> None:
        """All steps at this depth, in the order of the lists: what they wait for is no deeper."""
        for here in self._program.ranks:
            for index in range(len(here.steps)):
                if self._depth[here.rank][index] == number:
                    self._symbols.do(here, index)

    def _messages(self, number: int) -> Iterator[Sent]:
        for pair in self._pairs:
            rank, index = pair.target
            if self._depth[rank][index] == number:
                yield self._sent(pair)

    def _sent(self, pair: Pair) -> Sent:
        rank, index = pair.target
        step = self._program.ranks[rank].steps[index]
        assert isinstance(step, Message)
        sent = self._program.ranks[pair.source[0]].steps[pair.source[1]]
        assert isinstance(sent, Message)
        # What goes to scratch is described by where it came from.
        chunk = step.chunk if step.chunk.buffer == self._buffer else sent.chunk
        parts = tuple(
            number
            for number, (start, stop) in enumerate(self._parts)
            if any(a < stop and start < b for a, b in chunk.ranges)
        )
        return Sent(
            source=pair.source[0],
            target=rank,
            parts=parts if chunk.buffer == self._buffer else (),
            count=chunk.count,
            is_reduced=self._program.task.is_reducing
            and (isinstance(step, RecvReduce) or step.chunk.buffer != self._buffer),
        )

    def _holdings(self) -> tuple[tuple[frozenset[int], ...], ...]:
        if self._program.task.op == "barrier":
            return tuple((self._known(rank),) for rank in range(self._program.task.ranks))
        return tuple(
            tuple(self._held(rank, start) for start, _ in self._parts)
            for rank in range(self._program.task.ranks)
        )

    def _held(self, rank: int, start: int) -> frozenset[int]:
        memory = self._symbols.memory[rank].get(self._buffer)
        if memory is None or start >= memory.count:
            return frozenset()
        held: Sum = next(memory.read(start, start + 1))[2]
        return _members(held.ranks)

    def _known(self, rank: int) -> frozenset[int]:
        """Of a barrier: who has entered, as far as a rank knows."""
        known = 1 << rank
        for ranks in self._symbols.heard[rank]:
            known |= ranks
        return _members(known)


def _ends(sent: Sent) -> tuple[int, int]:
    return sent.source, sent.target


def _members(ranks: int) -> frozenset[int]:
    return frozenset(rank for rank in range(ranks.bit_length()) if ranks >> rank & 1)


def _parts(program: Program, name: str) -> tuple[tuple[int, int], ...]:
    """The pieces of a buffer that steps touch as wholes."""
    borders = {0}
    for here in program.ranks:
        borders |= {buffer.count for buffer in here.buffers if buffer.name == name}
        for step in here.steps:
            chunks = (step.chunk,) if isinstance(step, Message) else (step.source, step.target)
            for chunk in chunks:
                if chunk.buffer == name:
                    borders.update(border for bounds in chunk.ranges for border in bounds)
    ordered = sorted(borders)
    return tuple(itertools.pairwise(ordered))

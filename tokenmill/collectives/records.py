"""Steps as they are written, and the dependencies that follow from the ranges they touch.

A reader waits for the last writer of its elements, a writer for those who have read them since, or,
if there are none, for the writer before. `legality.py` checks the result independently.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tokenmill.collectives.program import Chunk, Copy, Recv, RecvReduce, Reduce, Send, Step
from tokenmill.collectives.ranges import Ranges

SEND, RECV, RECV_REDUCE, COPY, REDUCE = range(5)


class Record(NamedTuple):
    """A step as it was written: no dependencies yet."""

    kind: int
    buffer: str
    """What a send reads and everything else writes."""
    ranges: Ranges
    peer: int = -1
    tag: int = 0
    source: str = ""
    """What a copy or a reduce reads."""
    source_ranges: Ranges = ()


class _Elements:
    """Who last wrote each piece of a buffer, and who has read it since.

    Pieces lie between neighbouring borders of all ranges, so a step touches all of one or nothing.
    """

    def __init__(self, borders: set[int]) -> None:
        self._index = {border: index for index, border in enumerate(sorted(borders))}
        self._writer = [-1] * len(borders)
        self._readers: list[tuple[int, ...]] = [()] * len(borders)

    def read(self, step: int, ranges: Ranges, found: set[int]) -> None:
        """Note a reader; whom it waits for goes into `found`."""
        for start, stop in ranges:
            for piece in range(self._index[start], self._index[stop]):
                if self._writer[piece] >= 0:
                    found.add(self._writer[piece])
                self._readers[piece] += (step,)

    def write(self, step: int, ranges: Ranges, found: set[int]) -> None:
        """Note a writer; whom it waits for goes into `found`."""
        for start, stop in ranges:
            for piece in range(self._index[start], self._index[stop]):
                if self._readers[piece]:
                    found.update(self._readers[piece])
                    self._readers[piece] = ()
                elif self._writer[piece] >= 0:
                    found.add(self._writer[piece])
                self._writer[piece] = step


def dependencies(records: Sequence[Record]) -> list[tuple[int, ...]]:
    """For each step the earlier ones that it must wait for."""
    elements = {name: _Elements(borders) for name, borders in _borders(records).items()}
    result = []
    for step, record in enumerate(records):
        found: set[int] = set()
        if record.source:
            elements[record.source].read(step, record.source_ranges, found)
        if record.kind == SEND:
            elements[record.buffer].read(step, record.ranges, found)
        else:
            elements[record.buffer].write(step, record.ranges, found)
        result.append(tuple(sorted(found)))
    return result


def _borders(records: Sequence[Record]) -> dict[str, set[int]]:
    """For each buffer, where ranges start and stop."""
    borders: dict[str, set[int]] = {}
    for record in records:
        found = borders.setdefault(record.buffer, set())
        for bounds in record.ranges:
            found.update(bounds)
        if record.source:
            found = borders.setdefault(record.source, set())
            for bounds in record.source_ranges:
                found.update(bounds)
    return borders


def make_step(record: Record, after: tuple[int, ...]) -> Step:
    """The step as the language has it."""
    chunk = Chunk(record.buffer, record.ranges)
    if record.kind == SEND:
        return Send(chunk, record.peer, record.tag, after)
    if record.kind == RECV:
        return Recv(chunk, record.peer, record.tag, after)
    if record.kind == RECV_REDUCE:
        return RecvReduce(chunk, record.peer, record.tag, after)
    source = Chunk(record.source, record.source_ranges)
    return (Copy if record.kind == COPY else Reduce)(source, chunk, after)

"""What an algorithm writes with: the steps of one rank, slice after slice.

An algorithm says `send`, `recv` ... in an order in which one step after the other would do; which
of them must wait for which follows from the ranges that they touch (`records.py`).
"""

from collections.abc import Callable, Iterable

from tokenmill.collectives.program import Buffer, Plan
from tokenmill.collectives.ranges import Range, Ranges, joined, part, size
from tokenmill.collectives.records import COPY, RECV, RECV_REDUCE, REDUCE, SEND, Record
from tokenmill.collectives.task import BLOCK_OPS, Task

DATA = "data"
LANES = 8
"""Tags for each slice; no algorithm has more lanes."""


class Scope:
    """What an algorithm sees of its task: one slice of it, from one place.

    Places are the algorithm's own numbering of the ranks, 0 to `size` - 1.
    """

    def __init__(self, task: Task, plan: Plan, place: int, slice_index: int) -> None:
        self.task, self.plan, self.place = task, plan, place
        self.size = task.ranks
        self.root = plan.order.index(task.root) if plan.order else task.root
        self.slice_index = slice_index
        self.region = part((0, task.count), plan.slices, slice_index)
        """The elements of this slice, where the vector is not cut into blocks that ranks own."""

    @property
    def whole(self) -> Ranges:
        """The region as ranges."""
        return joined([self.region])

    def rank(self, place: int) -> int:
        """The rank at a place."""
        return self.plan.order[place] if self.plan.order else place

    def sliced(self, block: Range) -> Range:
        """This slice's part of a block."""
        return part(block, self.plan.slices, self.slice_index)

    def blocks(self, index: Callable[[int], int] | None = None) -> "Blocks":
        """The blocks of the places, cut so that each place can own one.

        Where the operation does not say which elements a rank owns, the algorithm may:
        `index(place)` is the position of the place's block in the region (default: the place).
        """
        return Blocks(self, index)


class Blocks:
    """The elements that each place owns; `lane_part` takes one of several equal parts of each."""

    def __init__(self, scope: Scope, index: Callable[[int], int] | None = None) -> None:
        self._scope, self._index = scope, index
        self._is_owned = scope.task.op in BLOCK_OPS
        self._part: tuple[int, int] | None = None

    def lane_part(self, parts: int, lane: int) -> "Blocks":
        """The same places, with one of so many parts of the vector."""
        result = Blocks(self._scope, self._index)
        result._part = (parts, lane)
        return result

    def __call__(self, place: int) -> Ranges:
        start, stop = self._block(place)
        return ((start, stop),) if start < stop else ()

    def union(self, places: Iterable[int]) -> Ranges:
        """What these places own together."""
        if self._is_owned or self._index is not None:
            return joined(self._block(place) for place in places)
        ordered = places if isinstance(places, range) else sorted(places)
        if ordered[-1] - ordered[0] + 1 == len(ordered):
            return joined([(self._block(ordered[0])[0], self._block(ordered[-1])[1])])
        return joined(self._block(place) for place in ordered)

    def _block(self, place: int) -> Range:
        scope = self._scope
        if self._is_owned:
            block = scope.sliced(scope.task.block(scope.rank(place)))
            return part(block, *self._part) if self._part else block
        region = part(scope.region, *self._part) if self._part else scope.region
        return part(region, scope.size, place if self._index is None else self._index(place))


class Writer:
    """Takes down the steps of one rank, slice after slice."""

    def __init__(self, task: Task, plan: Plan, rank: int, *, is_streaming: bool) -> None:
        self._order = plan.order
        self._is_streaming = is_streaming
        self._slice = 0
        self._clock = 0
        self._records: list[tuple[int, int, Record]] = []
        self.buffers = list(task_buffers(task, rank))

    def start_slice(self, index: int) -> None:
        """What follows belongs to another slice of the work."""
        self._slice, self._clock = index, 0

    def start_lane(self) -> None:
        """What follows runs beside what this slice had before, step for step."""
        self._clock = 0

    def scratch(self, name: str, count: int, *, is_wide: bool = False) -> str:
        """A buffer for this slice alone; returns its name."""
        name = f"{name}{self._slice}" if self._slice else name
        if count:
            self.buffers.append(Buffer(name, count, is_wide))
        return name

    def send(self, place: int, ranges: Ranges, *, buffer: str = DATA, lane: int = 0) -> None:
        self._message(SEND, place, buffer, ranges, lane)

    def recv(self, place: int, ranges: Ranges, *, buffer: str = DATA, lane: int = 0) -> None:
        self._message(RECV, place, buffer, ranges, lane)

    def recv_reduce(self, place: int, ranges: Ranges, *, buffer: str = DATA, lane: int = 0) -> None:
        self._message(RECV_REDUCE, place, buffer, ranges, lane)

    def copy(self, source: str, source_ranges: Ranges, target: str, ranges: Ranges) -> None:
        self._add(Record(COPY, target, ranges, -1, 0, source, source_ranges))

    def reduce(self, source: str, source_ranges: Ranges, target: str, ranges: Ranges) -> None:
        self._add(Record(REDUCE, target, ranges, -1, 0, source, source_ranges))

    def _message(self, kind: int, place: int, buffer: str, ranges: Ranges, lane: int) -> None:
        tag = lane if self._is_streaming else lane + LANES * self._slice
        peer = self._order[place] if self._order else place
        self._add(Record(kind, buffer, ranges, peer, tag))

    def _add(self, record: Record) -> None:
        self._clock += 1  # of empty steps too, so that slices keep in step
        if record.ranges:
            self._records.append((self._clock, self._slice, record))

    def records(self) -> list[Record]:
        """What was written, in the order of the list.

        Slices take turns: their steps are the same, so the order stays one in which each step could
        wait for the one before. Those of a stream follow one another.
        """
        if not self._is_streaming:
            self._records.sort(key=lambda entry: entry[:2])
        return [record for _, _, record in self._records]


def task_buffers(task: Task, rank: int) -> tuple[Buffer, ...]:
    """The buffers that the operation itself has at a rank; those of no elements are left out."""
    if task.op == "barrier":
        return (Buffer("token", 1),)
    if task.op == "all_to_all":
        sizes = {"input": size(task.sent_ranges(rank)), "output": size(task.received_ranges(rank))}
    else:
        sizes = {DATA: task.count}
    return tuple(Buffer(name, count) for name, count in sizes.items() if count)

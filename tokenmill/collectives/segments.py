"""A buffer as the provers see it: a few segments, each with one value for all of its elements."""

from bisect import bisect_right
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Segments(Generic[T]):
    """Values of the elements 0 to `count` - 1, of which neighbours are often alike."""

    def __init__(self, count: int, value: T) -> None:
        self.count = count
        self._starts = [0]
        self._values = [value]

    def read(self, start: int, stop: int) -> Iterator[tuple[int, int, T]]:
        """The pieces of [start, stop), in order: start, stop, value."""
        starts, values = self._starts, self._values
        index = bisect_right(starts, start) - 1
        while start < stop:
            end = starts[index + 1] if index + 1 < len(starts) else self.count
            yield start, min(end, stop), values[index]
            start, index = end, index + 1

    def write(self, start: int, stop: int, value: T) -> None:
        """Give all elements of [start, stop) this value."""
        starts, values = self._starts, self._values
        first = bisect_right(starts, start) - 1
        last = bisect_right(starts, stop - 1) - 1
        end = starts[last + 1] if last + 1 < len(starts) else self.count
        new_starts, new_values = [start], [value]
        if starts[first] < start:
            new_starts.insert(0, starts[first])
            new_values.insert(0, values[first])
        if stop < end:
            new_starts.append(stop)
            new_values.append(values[last])
        starts[first : last + 1] = new_starts
        values[first : last + 1] = new_values

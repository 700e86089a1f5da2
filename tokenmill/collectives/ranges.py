"""Ranges of elements: how a vector is cut into blocks and blocks into slices."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TypeAlias

Range: TypeAlias = tuple[int, int]
"""Elements [start, stop)."""
Ranges: TypeAlias = tuple[Range, ...]


def bound(count: int, parts: int, index: int) -> int:
    """Where part `index` of `parts` nearly equal parts of `count` elements starts."""
    return index * count // parts


@lru_cache(maxsize=1 << 16)
def part(whole: Range, parts: int, index: int) -> Range:
    """One of `parts` nearly equal parts of a range."""
    start, stop = whole
    count = stop - start
    return start + bound(count, parts, index), start + bound(count, parts, index + 1)


def offsets(counts: Sequence[int]) -> tuple[Range, ...]:
    """Ranges of these lengths, one after the other."""
    ranges, start = [], 0
    for count in counts:
        ranges.append((start, start + count))
        start += count
    return tuple(ranges)


def joined(ranges: Iterable[Range]) -> Ranges:
    """Sorted by start, without empty ones, neighbours joined. The ranges must not overlap."""
    result: list[Range] = []
    for start, stop in sorted(ranges):
        if start == stop:
            continue
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return tuple(result)


def size(ranges: Iterable[Range]) -> int:
    """Elements in all of them."""
    return sum(stop - start for start, stop in ranges)

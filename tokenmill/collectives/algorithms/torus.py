"""A two-dimensional torus: rings along rows and columns, all four links of a place busy at a time.

Place y * X + x stands in column x of row y. Half of the vector goes along rows first and then along
columns, the other half the other way round, and each half in both directions: four lanes with a
quarter each. Mikami et al., "Massively distributed SGD" (2018) for the 2D ring; Jouppi et al., "TPU
v4" (2023) for why all links.
"""

from collections.abc import Callable

from tokenmill.collectives.algorithms.ring import (
    make_ring,
    write_all_gather,
    write_reduce_scatter,
)
from tokenmill.collectives.program import Plan
from tokenmill.collectives.ranges import Ranges
from tokenmill.collectives.writer import Scope, Writer

LANES = range(4)


def row_length(ranks: int, plan: Plan) -> int:
    """X: as the plan has it, else whole hosts to a row, in a shape with as few steps as can be."""
    if plan.width:
        return plan.width
    unit = ranks // plan.hosts if plan.hosts > 1 else 1
    lengths = (x for x in range(unit, ranks + 1, unit) if ranks % x == 0)
    return min(lengths, key=lambda x: (x + ranks // x, x))


class _Lane:
    """One quarter of the vector: its two rings, and what each position of them owns."""

    def __init__(self, scope: Scope, lane: int) -> None:
        width = row_length(scope.size, scope.plan)
        height = scope.size // width
        y, x = divmod(scope.place, width)
        self._is_row_first, is_reversed = lane < 2, lane % 2 == 1
        at: Callable[[int, int], int] = lambda column, row: row * width + column  # noqa: E731
        row = make_ring(x, width, lambda i: at(i, y), lane, is_reversed=is_reversed)
        column = make_ring(y, height, lambda i: at(x, i), lane, is_reversed=is_reversed)
        self._at: Callable[[int, int], int]
        if self._is_row_first:
            self.first, self.second, self._at, self._here = row, column, at, x
        else:
            self.first, self.second, self._here = column, row, y
            self._at = lambda row, column: at(column, row)
        # Blocks are cut so that what one position of the first ring owns is one range.
        index = (lambda place: place % width * height + place // width) if lane < 2 else None
        self._blocks = scope.blocks(index).lane_part(len(LANES), lane)
        self._sign = -1 if is_reversed else 1
        self._parts: dict[int, Ranges] = {}

    def of_first(self, position: int) -> Ranges:
        """What a position of the first ring owns with all of the second dimension."""
        if position not in self._parts:
            index = self._sign * position % self.first.length
            places = [self._at(index, other) for other in range(self.second.length)]
            self._parts[position] = self._blocks.union(places)
        return self._parts[position]

    def of_second(self, position: int) -> Ranges:
        """What a position of the second ring owns."""
        return self._blocks(self._at(self._here, self._sign * position % self.second.length))

    def write_reduce_scatter(self, write: Writer) -> None:
        write_reduce_scatter(write, self.first, self.of_first)
        write_reduce_scatter(write, self.second, self.of_second)

    def write_all_gather(self, write: Writer) -> None:
        write_all_gather(write, self.second, self.of_second)
        write_all_gather(write, self.first, self.of_first)


def reduce_scatter(scope: Scope, write: Writer) -> None:
    for lane in LANES:
        write.start_lane()
        _Lane(scope, lane).write_reduce_scatter(write)


def all_gather(scope: Scope, write: Writer) -> None:
    for lane in LANES:
        write.start_lane()
        _Lane(scope, lane).write_all_gather(write)


def all_reduce(scope: Scope, write: Writer) -> None:
    """2(X + Y - 2) steps, 2(p-1)n/p sent."""
    for lane in LANES:
        write.start_lane()
        here = _Lane(scope, lane)
        here.write_reduce_scatter(write)
        here.write_all_gather(write)

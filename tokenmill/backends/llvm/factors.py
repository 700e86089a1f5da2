"""Where the factors of adapters lie: a slot each, of one size, filled anew while steps go on.

    a slot of A   [rank: i32, filling][ranks 0 to 7: inputs 0 to 31 of each | 32 to 63 ... ][...]
    a slot of B   [rank: i32, filling][pair 0: rank 0: 32 outputs | rank 1 ... ][pair 1 ... ]

The rank is the adapter's own: 0 where it leaves the linear as it is. It is filled up with zeros
to whole runs of ranks; what lies beyond belonged to an earlier adapter and is never read. Inputs
are filled up with zeros to whole pairs of vectors. Outputs lie in the order in which their linear
stores them; of bfloat16, two ranks share a 32-bit lane, as the dot instruction wants them. So each
kernel reads its factor from front to back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tokenmill.backends.llvm.memory import Arena
from tokenmill.backends.llvm.packing import PAIR_ROWS, RowOrder, round_up
from tokenmill.ir.low_rank import LowRank

HEADER_BYTES = 64
RANKS_AT_ONCE = 8
"""Rows of A that are multiplied together: so many sums hide the time that an addition takes."""

F32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Factor:
    """The layout of one factor in all slots; `order` is that of B's outputs, None for an A."""

    weight: str  # whose change it is a factor of; a name in its function
    dtype: str  # of the graph's type
    slots: int
    rank: int
    width: int  # stored inputs of A, stored outputs of B
    order: RowOrder | None = None

    @property
    def stored_rank(self) -> int:
        return round_up(self.rank, RANKS_AT_ONCE)

    @property
    def element(self) -> np.dtype[Any]:
        return np.dtype(np.float32 if self.dtype == "lora" else ml_dtypes.bfloat16)

    @property
    def part_bytes(self) -> int:
        return self.element.itemsize * self.parts[1]

    @property
    def neighbours(self) -> int:
        """Of B: ranks that share a 32-bit lane."""
        return 4 // self.element.itemsize

    @property
    def parts(self) -> tuple[int, int]:
        """A is cut into runs of ranks, B into pairs: how many there are, of how many numbers."""
        size = RANKS_AT_ONCE * self.width if self.order is None else PAIR_ROWS * self.stored_rank
        return self.stored_rank * self.width // size, size

    @property
    def slot_bytes(self) -> int:
        return HEADER_BYTES + self.element.itemsize * self.stored_rank * self.width

    @property
    def size_bytes(self) -> int:
        return self.slots * self.slot_bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class FactorMemory:
    """The factors of every adapted linear, by the full name of its weight, in one arena."""

    arena: Arena
    places: Mapping[tuple[str, Factor], int]

    @staticmethod
    def of(wanted: Mapping[tuple[str, Factor], None]) -> "FactorMemory":
        """Room for all factors; every slot holds rank 0. Raises CapacityError."""
        places, top = {}, 0
        for name, factor in wanted:
            places[name, factor] = top
            top += round_up(factor.size_bytes, HEADER_BYTES)
        return FactorMemory(arena=Arena(max(top, HEADER_BYTES)), places=places)

    def address(self, name: str, factor: Factor) -> int:
        return self.arena.address + self.places[name, factor]

    def put(self, slot: int, changes: Mapping[str, LowRank]) -> None:
        """Fill a slot, which no step in flight reads; what it held before is gone."""
        for (name, factor), place in self.places.items():
            start = place + slot * factor.slot_bytes
            self._put(factor, start, changes.get(name))

    def _put(self, factor: Factor, start: int, change: LowRank | None) -> None:
        rank = 0 if change is None else len(change.down_RK)
        assert rank <= factor.rank, (factor, rank)
        self.arena.view(np.int32, (1,), start)[0] = rank
        if change is None:
            return
        stored = _stored_inputs if factor.order is None else _stored_outputs
        values = stored(change, factor)
        place = self.arena.view(factor.element, factor.parts, start + HEADER_BYTES)
        place[: values.shape[0], : values.shape[1]] = values


def _stored_inputs(change: LowRank, factor: Factor) -> F32Array:
    """[runs of ranks, values]"""
    rank, k = change.down_RK.shape
    runs = round_up(rank, RANKS_AT_ONCE) // RANKS_AT_ONCE
    filled = np.zeros((runs * RANKS_AT_ONCE, factor.width), np.float32)
    filled[:rank, :k] = change.down_RK
    pairs = filled.reshape(runs, RANKS_AT_ONCE, -1, PAIR_ROWS).swapaxes(1, 2)
    return pairs.reshape(runs, -1)


def _stored_outputs(change: LowRank, factor: Factor) -> F32Array:
    """[pairs, values]: outputs in stored order, filling as zeros."""
    assert factor.order is not None
    rows, rank = factor.order.rows(), change.up_NR.shape[1]
    side_by_side = factor.neighbours
    filled = np.zeros((len(rows), round_up(rank, side_by_side)), np.float32)
    filled[rows >= 0, :rank] = change.up_NR[rows[rows >= 0]]
    pairs = filled.reshape(-1, PAIR_ROWS, filled.shape[1] // side_by_side, side_by_side)
    return pairs.swapaxes(1, 2).reshape(len(pairs), -1)

"""Where the factors of adapters lie: a slot each, of one size, filled anew while steps go on.

    a slot of A   [rank: i32, filling][row 0: inputs][row 1 ...                             ]
    a slot of B   [rank: i32, filling][pair 0: rank 0: 32 outputs | rank 1 ... ][pair 1 ... ]

The rank is the adapter's own: 0 where it leaves the linear as it is. What lies beyond it belonged
to an earlier adapter and counts nothing. Inputs are filled up with zeros to whole pairs of
vectors; outputs lie in the order in which their linear stores them, so that an epilogue finds the
32 that it has in registers side by side.
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
ROWS_AT_ONCE = 8
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
        return round_up(self.rank, ROWS_AT_ONCE)

    @property
    def element(self) -> np.dtype[Any]:
        return np.dtype(np.float32 if self.dtype == "lora" else ml_dtypes.bfloat16)

    @property
    def row_bytes(self) -> int:
        """Of A: the inputs of one rank."""
        return self.element.itemsize * self.width

    @property
    def slot_bytes(self) -> int:
        return HEADER_BYTES + self.stored_rank * self.row_bytes

    @property
    def size_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def pair_bytes(self) -> int:
        """Of B: 32 outputs for every rank."""
        return self.element.itemsize * self.stored_rank * PAIR_ROWS


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
        start += HEADER_BYTES
        if factor.order is None:
            inputs = self.arena.view(factor.element, (rank, factor.width), start)
            inputs[:, : change.down_RK.shape[1]] = change.down_RK
            return
        pairs = factor.width // PAIR_ROWS
        shape = (pairs, factor.stored_rank, PAIR_ROWS)
        outputs = self.arena.view(factor.element, shape, start)
        outputs[:, :rank] = _stored(change.up_NR, factor.order)


def _stored(up_NR: F32Array, order: RowOrder) -> F32Array:
    """[pairs, R, PAIR_ROWS]: outputs in stored order, filling as zeros."""
    rows = order.rows()
    stored = np.where((rows >= 0)[:, None], up_NR[rows], np.float32(0))
    return stored.reshape(-1, PAIR_ROWS, up_NR.shape[1]).swapaxes(1, 2)

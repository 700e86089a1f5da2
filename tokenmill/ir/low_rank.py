"""What adapters bring to a graph: low-rank changes of linears, in slots. R ranks, T tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tokenmill.ir.order import F32Array

IntArray = npt.NDArray[np.int32]

FACTORS = {"lora": "f32", "lora16": "bf16"}
"""Types of factors, and the format that their numbers are kept in."""

NO_ADAPTER = -1
"""The slot of a token without an adapter."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank:
    """What an adapter adds to one linear's weights [N, K]: up_NR @ down_RK."""

    down_RK: F32Array
    up_NR: F32Array


@dataclass(frozen=True, kw_only=True)
class FactorSlots:
    """One factor of what adapters change in one linear: A [R, K] or B [N, R] for each slot.

    None: the slot's adapter leaves the linear as it is. Ranks may differ, and are at most `rank`.
    """

    rank: int
    matrices: list[F32Array | None]
    is_rounded: bool = False  # to bfloat16

    def put(self, slot: int, matrix: F32Array | None) -> None:
        if matrix is not None and self.is_rounded:
            matrix = matrix.astype(ml_dtypes.bfloat16).astype(np.float32)
        self.matrices[slot] = matrix

    def rows(self, adapters_T: IntArray) -> Iterator[tuple[npt.NDArray[np.intp], F32Array]]:
        """Which rows take which matrix; those that take none are left out."""
        for slot, matrix in enumerate(self.matrices):
            if matrix is not None:
                yield np.flatnonzero(adapters_T == slot), matrix

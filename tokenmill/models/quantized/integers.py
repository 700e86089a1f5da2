"""Rows of small integers with a scale and a zero point for each group: what GPTQ, AWQ and
compressed-tensors have in common once their packing is undone.

    weight = scale * (integer - zero)

Groups are given as runs of GROUP columns, of which a file's larger groups are made. Where a format
of ours holds such integers they are handed over as they are, and nothing but the scale is rounded,
to float16. N rows, K columns, G = K / GROUP groups a row, rounded up.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenmill.ir.formats import FORMATS, GROUP, Format, Weight
from tokenmill.models.mapped import U8Array

F16Array = npt.NDArray[np.float16]
F32Array = npt.NDArray[np.float32]

INTEGER_ENCODINGS = {
    "int4": "q4_0",
    "int4 with zero points": "q4_z",
    "int8": "q8",
    "int8 with zero points": "q8_z",
}
"""Encodings whose rows are those of `IntegerRows`, and the format that is nearest to each."""

VALUE_ENCODINGS = ("int4 in act-order", "int8 in act-order", "fp8 in small blocks")
"""Encodings that are handed over as float32 values, since no format of ours has their scales."""

_LOWEST = {"q4_0": -8, "q8": -128}  # of what a layout holds; rounding to q8 goes to -127 only
_MIDDLE = {"q4_z": 0, "q8_z": 128}  # is taken from integers and zero points


@dataclass(frozen=True, kw_only=True, eq=False)
class IntegerRows:
    """Integers [N, K], and for each group of 32 columns a scale and a zero point, [N, G]."""

    integers: U8Array
    scales: F32Array
    zeros: F32Array

    @staticmethod
    def from_bytes(data: U8Array, k: int) -> "IntegerRows":
        """The rows of `to_bytes`, or some of them."""
        num_groups = -(-k // GROUP)
        heads = np.ascontiguousarray(data[:, : 8 * num_groups]).view(np.float32)
        return IntegerRows(
            integers=data[:, 8 * num_groups :],
            scales=heads[:, :num_groups],
            zeros=heads[:, num_groups:],
        )

    def to_bytes(self) -> U8Array:
        """[N, 8 G + K] bytes: a row's scales, its zero points, its integers."""
        heads = np.concatenate([self.scales, self.zeros], axis=1)
        return np.concatenate([heads.view(np.uint8), self.integers], axis=1)

    def dequantize(self) -> F32Array:
        """The weights, [N, K]; exact where a scale has no more than 15 bits, as float16 has."""
        values: F32Array = self.integers - self._by_column(self.zeros)
        values *= self._by_column(self.scales)
        return values

    def as_weight(self, format_name: str) -> Weight | None:
        """The same integers in one of our formats; None where it does not hold them."""
        with np.errstate(over="ignore"):
            scales = self.scales.astype(np.float16)
            minimums = (-self.scales * self.zeros).astype(np.float16)
        row = FORMATS[format_name]
        if format_name == "q4" and self.integers.max() <= row.highest:
            return Weight(format="q4", quants=self.integers, scales=scales, minimums=minimums)
        if format_name in _LOWEST:
            centred = self.integers - self._by_column(self.zeros)
            if centred.min() < _LOWEST[format_name] or centred.max() > row.highest:
                return None
            return Weight(format=format_name, quants=centred.astype(np.int8), scales=scales)
        return self._with_zeros(row, scales) if row.has_zero else None

    def _with_zeros(self, row: Format, scales: F16Array) -> Weight | None:
        middle = _MIDDLE[row.name]
        exact = self.zeros - middle
        with np.errstate(invalid="ignore"):
            zeros = exact.astype(row.quant_dtype)
        if self.integers.max() > row.highest + middle or (zeros != exact).any():
            return None
        quants = (self.integers - np.uint8(middle)).view(row.quant_dtype)
        return Weight(format=row.name, quants=quants, scales=scales, zeros=zeros)

    def _by_column(self, planes: F32Array) -> F32Array:
        return planes.repeat(GROUP, axis=1)[:, : self.integers.shape[1]]


def by_runs(planes: F32Array, group_size: int, k: int) -> F32Array:
    """[N, groups of `group_size` columns] -> [N, G]: a value for each run of GROUP columns."""
    num_runs = -(-k // GROUP)
    return planes.repeat(-(-group_size // GROUP), axis=1)[:, :num_runs]

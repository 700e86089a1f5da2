"""Rows of small integers with a scale and a zero point for each group: what GPTQ, AWQ and
compressed-tensors have in common once their packing is undone.

    weight = scale * (integer - zero)

Groups are given as runs of GROUP columns, of which a file's larger groups are made. Where a format
of ours holds such integers they are handed over as they are, and nothing but scale and minimum is
rounded to float16. N rows, K columns, G = K / GROUP groups a row, rounded up.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenmill.ir.formats import FORMATS, GROUP, Weight
from tokenmill.models.mapped import U8Array

F32Array = npt.NDArray[np.float32]

INTEGER_ENCODINGS = {
    "int4": "q4_0",
    "int4 with zero points": "q4",
    "int8": "q8",
    "int8 with zero points": "q8",
}
"""Encodings whose rows are those of `IntegerRows`, and the format that is nearest to each."""

VALUE_ENCODINGS = ("int4 in act-order", "int8 in act-order", "fp8")
"""Encodings that are handed over as float32 values, since no format of ours has their scales."""

_LOWEST = {"q4_0": -8, "q8": -128}  # of what a layout holds; rounding to q8 goes to -127 only


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
        highest = FORMATS[format_name].highest
        if format_name == "q4" and self.integers.max() <= highest:
            return Weight(format="q4", quants=self.integers, scales=scales, minimums=minimums)
        if format_name not in _LOWEST:
            return None
        centred = self.integers - self._by_column(self.zeros)
        if centred.min() < _LOWEST[format_name] or centred.max() > highest:
            return None
        return Weight(format=format_name, quants=centred.astype(np.int8), scales=scales)

    def _by_column(self, planes: F32Array) -> F32Array:
        return planes.repeat(GROUP, axis=1)[:, : self.integers.shape[1]]


def by_runs(planes: F32Array, group_size: int, k: int) -> F32Array:
    """[N, groups of `group_size` columns] -> [N, G]: a value for each run of GROUP columns."""
    num_runs = -(-k // GROUP)
    return planes.repeat(-(-group_size // GROUP), axis=1)[:, :num_runs]

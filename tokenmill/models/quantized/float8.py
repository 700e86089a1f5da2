"""Rows of float8 numbers (e4m3) with a scale for each RUN of them, as the format f8 has them.

N rows, K columns, S = K / RUN scales a row, rounded up.
"""

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tokenmill.ir.formats import FORMATS, Weight
from tokenmill.models.mapped import U8Array

F32Array = npt.NDArray[np.float32]

FLOAT8 = "fp8"
"""The encoding of such rows."""

RUN = FORMATS["f8"].scale_group

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def to_bytes(numbers: npt.NDArray[np.generic], scales: F32Array) -> U8Array:
    """[N, 4 S + K] bytes: a row's scales [S], its numbers [K]."""
    heads = np.ascontiguousarray(scales).view(np.uint8)
    return np.concatenate([heads, numbers.view(np.uint8)], axis=1)


def as_weight(data: U8Array, k: int) -> Weight:
    """The rows of `to_bytes`, or some of them."""
    start = 4 * -(-k // RUN)
    scales = np.ascontiguousarray(data[:, :start]).view(np.float32)
    numbers = np.ascontiguousarray(data[:, start:]).view(_E4M3)
    return Weight(format="f8", quants=numbers, scales=scales)

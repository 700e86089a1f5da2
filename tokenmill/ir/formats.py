"""Weight formats: what a matrix looks like before a backend packs it.

A quantised row is cut into groups of GROUP weights along k. Within a group
`w = scale * quant + minimum`; `q8` has no minimum. The last group of a row may be short.
A scale may be negative: some files have such groups, and they are kept as they are.
Shapes: N outputs (rows), K inputs (columns), G = ceil(K / GROUP) groups a row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tokenmill.ir.rounding import round_q4, round_q8

GROUP = 32

Array = npt.NDArray[np.generic]
F32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One row of the table of weight formats."""

    name: str
    quant_dtype: np.dtype[np.generic]
    bits_per_weight: float
    has_scale: bool
    has_minimum: bool


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(
            name="q4",
            quant_dtype=np.dtype(np.uint8),
            bits_per_weight=5.0,
            has_scale=True,
            has_minimum=True,
        ),
        Format(
            name="q8",
            quant_dtype=np.dtype(np.int8),
            bits_per_weight=8.5,
            has_scale=True,
            has_minimum=False,
        ),
        Format(
            name="bf16",
            quant_dtype=np.dtype(ml_dtypes.bfloat16),
            bits_per_weight=16.0,
            has_scale=False,
            has_minimum=False,
        ),
        Format(
            name="f32",
            quant_dtype=np.dtype(np.float32),
            bits_per_weight=32.0,
            has_scale=False,
            has_minimum=False,
        ),
    )
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Weight:
    """A matrix [N, K] (or a vector, as [1, K]) in one format, one array element a weight.

    `quants` [N, K] in the format's dtype; `scales` and `minimums` [N, G] float16 or None.
    """

    format: str
    quants: Array
    scales: Array | None = None
    minimums: Array | None = None

    def __post_init__(self) -> None:
        row = FORMATS[self.format]
        groups = (self.quants.shape[0], -(-self.quants.shape[1] // GROUP))
        assert self.quants.dtype == row.quant_dtype, (self.format, self.quants.dtype)
        for has, plane in ((row.has_scale, self.scales), (row.has_minimum, self.minimums)):
            assert has == (plane is not None), self.format
            assert plane is None or (plane.shape == groups and plane.dtype == np.float16)

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.quants.shape
        return n, k

    def take_rows(self, rows: npt.NDArray[np.integer]) -> "Weight":
        """The rows in another order; exact, since groups lie along k."""
        return Weight(
            format=self.format,
            quants=self.quants[rows],
            scales=None if self.scales is None else self.scales[rows],
            minimums=None if self.minimums is None else self.minimums[rows],
        )

    def dequantize(self) -> F32Array:
        """The matrix as float32 [N, K]."""
        groups = _grouped(self.quants.astype(np.float32))
        if self.scales is not None:
            groups *= self.scales.astype(np.float32)[:, :, None]
        if self.minimums is not None:
            groups += self.minimums.astype(np.float32)[:, :, None]
        return groups.reshape(groups.shape[0], -1)[:, : self.shape[1]]


def quantize(values: F32Array, format_name: str) -> Weight:
    """Round a float32 matrix [N, K] to a format, group by group, for a small squared error.

    A group beyond the range of float16 gets an infinite scale, without a warning.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return _QUANTIZERS[format_name](values)


def _quantize_q8(values: F32Array) -> Weight:
    n, k = values.shape
    quants, scales = np.empty((n, k), np.int8), np.empty((n, -(-k // GROUP)), np.float16)
    for rows in _row_chunks(n, k):
        column_quants, column_scales = round_q8(_columns(values[rows]))
        quants[rows] = _rows(column_quants, k)
        scales[rows] = column_scales.reshape(-1, scales.shape[1])
    return Weight(format="q8", quants=quants, scales=scales)


def _quantize_q4(values: F32Array) -> Weight:
    n, k = values.shape
    quants, scales = np.empty((n, k), np.uint8), np.empty((n, -(-k // GROUP)), np.float16)
    minimums = np.empty_like(scales)
    for rows in _row_chunks(n, k):
        column_quants, column_scales, column_minimums = round_q4(_columns(values[rows]))
        quants[rows] = _rows(column_quants, k)
        scales[rows] = column_scales.reshape(-1, scales.shape[1])
        minimums[rows] = column_minimums.reshape(-1, scales.shape[1])
    return Weight(format="q4", quants=quants, scales=scales, minimums=minimums)


_QUANTIZERS: dict[str, Callable[[F32Array], Weight]] = {
    "q4": _quantize_q4,
    "q8": _quantize_q8,
    "bf16": lambda v: Weight(format="bf16", quants=v.astype(ml_dtypes.bfloat16)),
    "f32": lambda v: Weight(format="f32", quants=v),
}


def _row_chunks(n: int, k: int) -> Iterator[slice]:
    """Slices of rows, few enough that a dozen float32 temporaries stay in the cache."""
    step = max(1, 2**16 // k)
    return (slice(start, start + step) for start in range(0, n, step))


def _grouped(values: F32Array) -> F32Array:
    """[N, K] -> [N, G, GROUP], the last group filled up by repeating its last weight."""
    n, k = values.shape
    short = -k % GROUP
    padded = np.pad(values, ((0, 0), (0, short)), mode="edge") if short else values
    return padded.reshape(n, -1, GROUP)


def _columns(values: F32Array) -> F32Array:
    """[N, K] -> [GROUP, N * G], a group a column."""
    return np.ascontiguousarray(_grouped(values).reshape(-1, GROUP).T)


def _rows(columns: Array, k: int) -> Array:
    """[GROUP, N * G] -> [N, K]."""
    groups = -(-k // GROUP)
    return columns.T.reshape(-1, groups * GROUP)[:, :k]

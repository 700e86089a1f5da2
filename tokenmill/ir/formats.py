"""Weight formats: what a matrix looks like before a backend packs it.

A quantised row is cut into groups of weights along k. Within a group `w = scale * quant + minimum`;
most formats have no minimum. The last group of a row may be short. A scale may be negative: some
files have such groups, and they are kept as they are.

The K formats are ggml's: SUPER weights share a float16 scale (and minimum), and a group's own is
that times a small integer, its factor. The Z formats are those of GPTQ and AWQ: a group has a zero
point, an integer like its quants, and the minimum is -scale * zero. Such products are exact in
float32. f8 is e4m3 with a float32 scale for each 128 weights, as finer ones of files are rare.
Shapes: N outputs (rows), K inputs (columns), G groups and S super-groups a row, rounded up.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tokenmill.ir.rounding import inverse, round_q4, round_q8, round_signed, round_to_range
from tokenmill.ir.rounding_k import Factored, round_k_signed, round_k_unsigned

GROUP = 32
SUPER = 256

_U8, _I8, _F16 = np.dtype(np.uint8), np.dtype(np.int8), np.dtype(np.float16)

Array = npt.NDArray[np.generic]
F32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One row of the table of weight formats.

    `lowest` and `highest` bound the quants; `scale_group` weights share a scale (and minimum);
    `factor_dtype` is that of the factors of a K format.
    """

    name: str
    quant_dtype: np.dtype[np.generic]
    bits_per_weight: float
    group: int = GROUP
    lowest: int = 0
    highest: int = 0
    has_scale: bool = True
    scale_dtype: np.dtype[np.generic] = _F16
    scale_group: int = GROUP
    has_minimum: bool = False
    has_zero: bool = False
    factor_dtype: np.dtype[np.generic] | None = None
    factor_limit: int = 0  # of their magnitude

    @property
    def is_integer(self) -> bool:
        """Whether quants are integers, which the int8 dot takes."""
        return bool(np.issubdtype(self.quant_dtype, np.integer))

    def planes(self, n: int, k: int) -> dict[str, tuple[tuple[int, int], np.dtype[np.generic]]]:
        """Shape and dtype of each array that a weight [n, k] has beside its quants, by name."""
        groups, outer = (n, -(-k // self.group)), (n, -(-k // self.scale_group))
        factors = self.factor_dtype
        found: dict[str, tuple[tuple[int, int], np.dtype[np.generic]]] = {}
        found |= {"scales": (outer, self.scale_dtype)} if self.has_scale else {}
        found |= {"minimums": (outer, self.scale_dtype)} if self.has_minimum else {}
        found |= {"zeros": (groups, self.quant_dtype)} if self.has_zero else {}
        if factors is not None:
            found["scale_factors"] = (groups, factors)
            found |= {"minimum_factors": (groups, factors)} if self.has_minimum else {}
        return found


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(name="q4", quant_dtype=_U8, bits_per_weight=5.0, highest=15, has_minimum=True),
        Format(name="q8", quant_dtype=_I8, bits_per_weight=8.5, lowest=-127, highest=127),
        Format(name="q4_0", quant_dtype=_I8, bits_per_weight=4.5, lowest=-8, highest=7),
        Format(name="q4_z", quant_dtype=_U8, bits_per_weight=4.75, highest=15, has_zero=True),
        Format(
            name="q8_z",
            quant_dtype=_I8,
            bits_per_weight=8.75,
            lowest=-128,
            highest=127,
            has_zero=True,
        ),
        Format(
            name="q4_k",
            quant_dtype=_U8,
            bits_per_weight=4.5,
            highest=15,
            has_minimum=True,
            scale_group=SUPER,
            factor_dtype=_U8,
            factor_limit=63,
        ),
        Format(
            name="q5_k",
            quant_dtype=_U8,
            bits_per_weight=5.5,
            highest=31,
            has_minimum=True,
            scale_group=SUPER,
            factor_dtype=_U8,
            factor_limit=63,
        ),
        Format(
            name="q6_k",
            quant_dtype=_I8,
            bits_per_weight=6.5625,
            group=16,
            lowest=-32,
            highest=31,
            scale_group=SUPER,
            factor_dtype=_I8,
            factor_limit=127,
        ),
        Format(
            name="f8",
            quant_dtype=np.dtype(ml_dtypes.float8_e4m3fn),
            bits_per_weight=8.25,
            lowest=-448,
            highest=448,
            scale_dtype=np.dtype(np.float32),
            scale_group=128,
        ),
        Format(
            name="bf16",
            quant_dtype=np.dtype(ml_dtypes.bfloat16),
            bits_per_weight=16.0,
            has_scale=False,
        ),
        Format(name="f32", quant_dtype=np.dtype(np.float32), bits_per_weight=32.0, has_scale=False),
    )
}

PLANES = ("scales", "minimums", "zeros", "scale_factors", "minimum_factors")


@dataclass(frozen=True, kw_only=True, eq=False)
class Weight:
    """A matrix [N, K] (or a vector, as [1, K]) in one format, one array element a weight.

    `quants` [N, K] in the format's dtype; the rest as `Format.planes` says, or None.
    """

    format: str
    quants: Array
    scales: Array | None = None
    minimums: Array | None = None
    zeros: Array | None = None
    scale_factors: Array | None = None
    minimum_factors: Array | None = None

    def __post_init__(self) -> None:
        row = FORMATS[self.format]
        assert self.quants.dtype == row.quant_dtype, (self.format, self.quants.dtype)
        wanted = row.planes(*self.shape)
        for name in PLANES:
            plane = getattr(self, name)
            found = None if plane is None else (plane.shape, plane.dtype)
            assert found == wanted.get(name), (self.format, name, found)

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.quants.shape
        return n, k

    def planes(self) -> dict[str, Array]:
        """The arrays beside the quants, by name."""
        return {name: getattr(self, name) for name in FORMATS[self.format].planes(*self.shape)}

    def take_rows(self, rows: npt.NDArray[np.integer]) -> "Weight":
        """The rows in another order; exact, since groups lie along k."""
        planes = {name: plane[rows] for name, plane in self.planes().items()}
        return Weight(format=self.format, quants=self.quants[rows], **planes)

    def group_scales(self) -> F32Array | None:
        """Each group's scale, [N, G] float32, or None for a format without."""
        return self._by_group(self.scales, self.scale_factors)

    def group_minimums(self) -> F32Array | None:
        """Each group's minimum, [N, G] float32, or None for a format without."""
        if self.zeros is None:
            return self._by_group(self.minimums, self.minimum_factors)
        return self._by_group(self.scales, -self.zeros.astype(np.float32))

    def _by_group(self, plane: Array | None, factors: Array | None) -> F32Array | None:
        if plane is None:
            return None
        row = FORMATS[self.format]
        num_groups = -(-self.shape[1] // row.group)
        wide = plane.astype(np.float32)
        product: F32Array = wide.repeat(row.scale_group // row.group, axis=1)[:, :num_groups]
        if factors is not None:
            product *= factors.astype(np.float32)
        return product

    def dequantize(self) -> F32Array:
        """The matrix as float32 [N, K]."""
        groups = _grouped(self.quants.astype(np.float32), FORMATS[self.format].group)
        scales, minimums = self.group_scales(), self.group_minimums()
        if scales is not None:
            groups *= scales[:, :, None]
        if minimums is not None:
            groups += minimums[:, :, None]
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


def _quantize_plain_signed(values: F32Array, name: str) -> Weight:
    """A format of signed integers and float16 scales, of rounding.round_signed."""
    row = FORMATS[name]
    n, k = values.shape
    quants = np.empty((n, k), row.quant_dtype)
    scales = np.empty((n, -(-k // row.group)), np.float16)
    for rows in _row_chunks(n, k):
        columns = _columns(values[rows], row.group)
        found = round_signed(columns, row.lowest, row.highest).astype(np.float16)
        integers = round_to_range(columns, np.float32(0), found, row.lowest, row.highest)
        quants[rows] = _rows(integers.astype(row.quant_dtype), k)
        scales[rows] = found.reshape(-1, scales.shape[1])
    return Weight(format=name, quants=quants, scales=scales)


def _quantize_with_zero(values: F32Array, name: str) -> Weight:
    """A Z format: a group's range, widened to hold 0, is cut into as many steps as quants have."""
    row = FORMATS[name]
    n, k = values.shape
    kinds = row.planes(n, k)
    planes: dict[str, Array] = {p: np.empty(shape, dtype) for p, (shape, dtype) in kinds.items()}
    quants = np.empty((n, k), row.quant_dtype)
    for rows in _row_chunks(n, k):
        columns = _columns(values[rows])
        low, high = np.minimum(columns.min(axis=0), 0), np.maximum(columns.max(axis=0), 0)
        scales = ((high - low) / np.float32(row.highest - row.lowest)).astype(np.float16)
        wide = scales.astype(np.float32)
        start, bounds = wide * np.float32(-row.lowest), (row.lowest, row.highest)
        zeros = round_to_range(-low, start, wide, *bounds)
        integers = round_to_range(columns, -wide * zeros, wide, *bounds)
        quants[rows] = _rows(integers.astype(row.quant_dtype), k)
        planes["scales"][rows] = scales.reshape(-1, kinds["scales"][0][1])
        planes["zeros"][rows] = zeros.reshape(-1, kinds["zeros"][0][1])
    return Weight(format=name, quants=quants, **planes)


def _quantize_f8(values: F32Array) -> Weight:
    """The largest weight of each `scale_group` becomes the largest number of e4m3."""
    row = FORMATS["f8"]
    n, k = values.shape
    columns = _columns(values, row.scale_group)
    scales = np.abs(columns).max(axis=0) / np.float32(row.highest)
    quants = _rows((columns * inverse(scales)).astype(row.quant_dtype), k)
    return Weight(format="f8", quants=quants, scales=scales.reshape(n, -1))


def _quantize_k(values: F32Array, name: str) -> Weight:
    """A K format, of rounding_k."""
    row = FORMATS[name]
    n, k = values.shape
    planes = {p: np.empty(shape, dtype) for p, (shape, dtype) in row.planes(n, k).items()}
    quants = np.empty((n, k), row.quant_dtype)
    per_super = SUPER // row.group
    sizes = {"per_super": per_super, "limit": row.factor_limit}
    for rows in _row_chunks(n, k):
        columns = _columns(values[rows], row.group, per_super)
        if row.has_minimum:
            rounded = round_k_unsigned(columns, row.highest, **sizes)
        else:
            rounded = round_k_signed(columns, row.lowest, row.highest, **sizes)
        quants[rows] = _rows(rounded.quants.astype(row.quant_dtype), k, per_super)
        _put_factors(planes, "scale", rows, rounded.scales)
        if rounded.minimums is not None:
            _put_factors(planes, "minimum", rows, rounded.minimums)
    return Weight(format=name, quants=quants, **planes)


def _put_factors(planes: dict[str, Array], kind: str, rows: slice, found: Factored) -> None:
    shared, factors = planes[f"{kind}s"], planes[f"{kind}_factors"]
    shared[rows] = found.shared.reshape(-1, shared.shape[1])
    own = found.factors.reshape(len(shared[rows]), -1)
    factors[rows] = own[:, : factors.shape[1]]


_QUANTIZERS: dict[str, Callable[[F32Array], Weight]] = {
    "q4": _quantize_q4,
    "q8": _quantize_q8,
    "q4_0": partial(_quantize_plain_signed, name="q4_0"),
    "q4_k": partial(_quantize_k, name="q4_k"),
    "q5_k": partial(_quantize_k, name="q5_k"),
    "q6_k": partial(_quantize_k, name="q6_k"),
    "q4_z": partial(_quantize_with_zero, name="q4_z"),
    "q8_z": partial(_quantize_with_zero, name="q8_z"),
    "f8": _quantize_f8,
    "bf16": lambda v: Weight(format="bf16", quants=v.astype(ml_dtypes.bfloat16)),
    "f32": lambda v: Weight(format="f32", quants=v),
}


def _row_chunks(n: int, k: int) -> Iterator[slice]:
    """Slices of rows, few enough that a dozen float32 temporaries stay in the cache."""
    step = max(1, 2**16 // k)
    return (slice(start, start + step) for start in range(0, n, step))


def _grouped(values: F32Array, group: int) -> F32Array:
    """[N, K] -> [N, G, group], the last group filled up by repeating its last weight."""
    n, k = values.shape
    short = -k % group
    padded = np.pad(values, ((0, 0), (0, short)), mode="edge") if short else values
    return padded.reshape(n, -1, group)


def _columns(values: F32Array, group: int = GROUP, per_super: int = 1) -> F32Array:
    """[N, K] -> [group, N * G], a group a column; groups of 0 make G a multiple of `per_super`."""
    groups = _grouped(values, group)
    if short := -groups.shape[1] % per_super:
        groups = np.pad(groups, ((0, 0), (0, short), (0, 0)))
    return np.ascontiguousarray(groups.reshape(-1, group).T)


def _rows(columns: Array, k: int, per_super: int = 1) -> Array:
    """[group, N * G] -> [N, K]."""
    whole = len(columns) * per_super
    return columns.T.reshape(-1, -(-k // whole) * whole)[:, :k]

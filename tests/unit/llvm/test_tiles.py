"""Tile kernels against NumPy, in the order of ir/order.py: bit by bit where the dot is defined so.

What Arm's bf16 dot instruction rounds on the way is the processor's business; there, results must
agree to the last bits of the largest term.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from tests.unit.llvm.emulator import EmulatedObject
from tests.unit.llvm.native import ALL_ROWS, aligned, call, load, row_named
from tokenmill.backends.llvm.compile import LoadedObject
from tokenmill.backends.llvm.emit import Module
from tokenmill.backends.llvm.packing import PACKINGS, PAIR_ROWS, RowOrder, pack_matrix
from tokenmill.backends.llvm.target import Row
from tokenmill.backends.llvm.tiles import OFFSETS, ROW_BYTES, Record, Tile, emit_tile
from tokenmill.ir.formats import FORMATS, Weight, quantize
from tokenmill.ir.order import GROUP, LANES, F32Array, tree_sum

Fma = Callable[[F32Array, F32Array, F32Array], F32Array]

K = 280  # the last group is short; more than SUPER
GROUPS = 9
KINDS = sorted(PACKINGS)


def tiles_of(row: Row) -> list[tuple[int, int]]:
    """Rows and pairs of kernels of every kind that the instruction set has."""
    most, wide = row.tile_rows, row.wide_rows
    rows = sorted({r for r in (1, 2, 3, wide + 1, most) if r <= most})
    return [(r, pairs) for r in rows for pairs in (1, 2) if pairs == 1 or r <= wide]


@cache
def kernels(row: Row, kind: tuple[str, str]) -> LoadedObject | EmulatedObject:
    """All kernels of a format and a dot."""
    module = Module("tiles")
    for rows, pairs in tiles_of(row):
        emit_tile(module, row, tile_of(kind, pairs), rows)
    return load(module, row)


def tile_of(kind: tuple[str, str], pairs: int) -> Tile:
    return Tile(format=kind[0], dot=kind[1], groups=GROUPS, pairs=pairs)


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """Activations as a kernel reads them: elements [T, G, GROUP], and per group their sums."""

    elements: npt.NDArray[np.generic]
    scales: F32Array | None
    sums: F32Array
    starts: npt.NDArray[np.int32] | None
    halves: npt.NDArray[np.int32] | None = None

    @staticmethod
    def of(x: F32Array, dtype: str) -> "Rounded":
        groups = np.pad(x, ((0, 0), (0, -x.shape[1] % GROUP))).reshape(len(x), -1, GROUP)
        if dtype == "int8":
            scales = np.abs(groups).max(axis=2) / np.float32(127)
            elements = np.rint(groups / scales[..., None]).astype(np.int8)
            totals = elements.sum(axis=2, dtype=np.int32)
            sums = totals.astype(np.float32) * scales
            halves = elements.reshape(*totals.shape, 2, -1).sum(axis=3, dtype=np.int32)
            return Rounded(
                elements=elements,
                scales=scales,
                sums=sums,
                starts=-128 * totals,
                halves=-32 * halves,
            )
        elements = groups.astype(ml_dtypes.bfloat16) if dtype == "bf16" else groups
        wide = elements.astype(np.float32)
        sums = tree_sum(wide[..., :LANES] + wide[..., LANES:])
        return Rounded(elements=elements, scales=None, sums=sums, starts=None)

    def bytes(self) -> npt.NDArray[np.uint8]:
        """Records, one a row; see tiles.Record."""
        parts = [self.elements.reshape(len(self.elements), -1), self.sums]
        parts += [p for p in (self.scales, self.starts, self.halves) if p is not None]
        flat = [np.ascontiguousarray(p).view(np.uint8).reshape(len(p), -1) for p in parts]
        return np.concatenate(flat, axis=1)


def run_tile(
    row: Row, kind: tuple[str, str], pairs: int, weights: list[Weight], x: Rounded
) -> F32Array:
    """What a kernel makes of `pairs` weights of PAIR_ROWS rows: [T, pairs * PAIR_ROWS]."""
    tile, rows = tile_of(kind, pairs), len(x.elements)
    order = RowOrder(count=PAIR_ROWS).rows()
    record, panels = x.bytes(), []
    assert record.shape[1] == Record(tile.dot, GROUPS).size
    for weight in weights:
        blocks = pack_matrix(weight, tile.packing, order).reshape(-1)
        panels.append(aligned(len(blocks)))
        panels[-1][:] = blocks
    stride = -(-record.shape[1] // 64) * 64
    activations, out = aligned(rows * stride), aligned(rows * ROW_BYTES)
    activations.reshape(rows, stride)[:, : record.shape[1]] = record
    call(kernels(row, kind), tile.symbol(rows), *panels, activations, stride, out)
    found = out.view(np.float32).reshape(rows, -1)
    return found[:, : pairs * PAIR_ROWS]


def reference(row: Row, kind: tuple[str, str], weight: Weight, x: Rounded) -> F32Array:
    """[T, N] in the order of ir/order.py: dots first, then scale, then minimum."""
    fma, offset = fma_of(row), np.float32(OFFSETS.get(kind, 0))
    n, k = weight.shape
    quants = np.zeros((n, GROUPS * GROUP), np.float32)
    quants[:, :k] = weight.quants.astype(np.float32)
    scales, minimums = weight.group_scales(), weight.group_minimums()
    size = FORMATS[weight.format].group
    out = np.zeros((len(x.elements), n), np.float32)
    for part in range(-(-k // size)):
        group, first = divmod(part * size, GROUP)
        elements = x.elements[:, group].astype(np.float32)
        dot = np.zeros_like(out)
        # Of a pair the high half comes first.
        for index in np.arange(first, first + size) ^ (kind[1] == "bf16"):
            w = quants[:, group * GROUP + index] + offset
            dot = fma(w[None], elements[:, index, None], dot)
        scale = None if scales is None else scales[None, :, part]
        minimum = None if minimums is None else minimums[None, :, part]
        if scale is not None and minimum is not None and offset:
            minimum = fma(scale, -offset, minimum)
        if x.scales is not None:
            x_scale = x.scales[:, group, None]
            scale = x_scale if scale is None else scale * x_scale
        out = out + dot if scale is None else fma(scale, dot, out)
        if minimum is not None:
            out = fma(minimum, x.sums[:, group, None], out)
    return out


def fma_of(row: Row) -> Fma:
    """a * b + c in float32, rounded once or twice."""
    return fused if row.has_fma else lambda a, b, c: a * b + c


def fused(a: F32Array, b: F32Array, c: F32Array) -> F32Array:
    """a * b + c rounded once: in float64 rounded to odd, which a second rounding cannot spoil."""
    product, addend = np.broadcast_arrays(a.astype(np.float64) * b, c.astype(np.float64))
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(np.int64)
    step = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where((error != 0) & (bits & 1 == 0), bits + step, bits)
    return odd.view(np.float64).astype(np.float32)


def is_exact(row: Row, kind: tuple[str, str]) -> bool:
    """Whether the dot's roundings are defined by ir/order.py alone."""
    return kind[1] != "bf16" or row.bf16_dot != "bfdot"


def last_bits(kind: tuple[str, str], weights: list[Weight], x: Rounded) -> float:
    """The last bit of the largest sum that a kernel may have on its way."""
    largest = OFFSETS.get(kind, 0) + max(FORMATS[kind[0]].highest, 128)
    scales = [np.abs(s).max() for w in weights if (s := w.group_scales()) is not None]
    sums = np.abs(x.elements.astype(np.float32)).sum(axis=2).max()
    return float(2.0**-23 * largest * max(scales, default=1.0) * sums)


@pytest.fixture(params=ALL_ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return row_named(request.param)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_every_kernel_follows_the_order_of_the_ir(row: Row, kind: tuple[str, str]) -> None:
    rng = np.random.default_rng(0)
    weights = [quantize(rng.standard_normal((PAIR_ROWS, K), np.float32), kind[0]) for _ in "ab"]
    for rows, pairs in tiles_of(row):
        x = Rounded.of(rng.standard_normal((rows, K), np.float32), kind[1])
        found = run_tile(row, kind, pairs, weights[:pairs], x)
        expected = np.concatenate([reference(row, kind, w, x) for w in weights[:pairs]], axis=1)
        if is_exact(row, kind):
            np.testing.assert_array_equal(found, expected, err_msg=f"{rows} rows, {pairs} pairs")
        else:
            np.testing.assert_allclose(found, expected, rtol=0, atol=last_bits(kind, weights, x))


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_row_gets_the_same_bits_in_every_tile(row: Row, kind: tuple[str, str]) -> None:
    rng = np.random.default_rng(1)
    weights = [quantize(rng.standard_normal((PAIR_ROWS, K), np.float32), kind[0]) for _ in "ab"]
    x = rng.standard_normal((row.tile_rows, K), np.float32)
    whole = run_tile(row, kind, 1, weights[:1], Rounded.of(x, kind[1]))
    for rows, pairs in tiles_of(row):
        found = run_tile(row, kind, pairs, weights[:pairs], Rounded.of(x[:rows], kind[1]))
        np.testing.assert_array_equal(found[:, :PAIR_ROWS], whole[:rows])


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_sums_of_small_integers_are_exact(row: Row, kind: tuple[str, str]) -> None:
    """No rounding is needed, so every instruction set and every order gives the same."""
    rng = np.random.default_rng(2)
    row_ = FORMATS[kind[0]]
    low, high = (row_.lowest, row_.highest) if row_.has_scale else (0, 15)
    quants = rng.integers(low, high + 1, (PAIR_ROWS, K)).astype(row_.quant_dtype)
    planes = {
        name: np.full(
            shape, {"scales": 0.5, "minimums": -3, "scale_factors": 2}.get(name, 1), dtype
        )
        for name, (shape, dtype) in row_.planes(PAIR_ROWS, K).items()
    }
    weight = Weight(format=kind[0], quants=quants, **planes)
    x = rng.integers(-9, 10, (min(3, row.tile_rows), K)).astype(np.float32)
    x[:, ::GROUP] = 127  # so that int8 rounds nothing
    found = run_tile(row, kind, 1, [weight], Rounded.of(x, kind[1]))
    np.testing.assert_array_equal(found, x @ weight.dequantize().T)

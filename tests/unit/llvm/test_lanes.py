"""The arithmetic that kernels are written in, against NumPy, on every instruction set here."""

import ml_dtypes
import numpy as np
import pytest

from tests.unit.llvm.native import ALL_ROWS, AnyArray, apply, row_named
from tokenmill.backends.llvm.emit import vector
from tokenmill.backends.llvm.kv_cache import quantize_pair
from tokenmill.backends.llvm.lanes import F32, HALF, I16, I32, Lanes
from tokenmill.backends.llvm.target import Row
from tokenmill.ir.numerics import SMALLEST_GROUP
from tokenmill.ir.order import LANES, tree_sum


@pytest.fixture(params=ALL_ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return row_named(request.param)


def floats_near_16_bits() -> AnyArray:
    """Every half and bfloat value, the midpoints between them, their neighbours; random bits."""
    rng = np.random.default_rng(0)
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    highs = np.arange(65536, dtype=np.uint32) << 16
    bases = (halves, halves + 0x1000, highs, highs + 0x8000)
    near = [base + step for base in bases for step in (0, 1, 0xFFFFFFFF)]
    anything = rng.integers(0, 1 << 32, 100_000, dtype=np.uint64)
    return np.concatenate([x.astype(np.uint32) for x in [*near, anything]]).view(np.float32)


def assert_same_bits(found: AnyArray, expected: AnyArray) -> None:
    """Equal bit by bit, NaN for NaN."""
    bits = np.dtype(f"u{found.itemsize}")
    is_nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), is_nan)
    np.testing.assert_array_equal(found.view(bits)[~is_nan], expected.view(bits)[~is_nan])


def test_every_half_becomes_its_float32(row: Row) -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    found = apply(row, Lanes.half_to_f32, halves, (HALF, F32), np.float32)
    assert_same_bits(found, halves.astype(np.float32))


def test_every_bfloat_becomes_its_float32(row: Row) -> None:
    patterns = np.arange(65536, dtype=np.uint16)
    found = apply(row, Lanes.bf16_to_f32, patterns, (I16, F32), np.float32)
    assert_same_bits(found, patterns.view(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_float32_is_rounded_to_the_nearest_bfloat(row: Row) -> None:
    """The instruction takes subnormal numbers for zero; nothing else differs between rows."""
    floats = floats_near_16_bits()
    found = apply(row, Lanes.f32_to_bf16, floats, (F32, I16), np.uint16)
    if row.bf16_dot == "vdpbf16ps":
        is_subnormal = np.abs(floats) < np.finfo(np.float32).tiny
        floats = np.where(is_subnormal, np.copysign(np.float32(0), floats), floats)
    assert_same_bits(found.view(ml_dtypes.bfloat16), floats.astype(ml_dtypes.bfloat16))


def test_exp_is_within_two_units_in_the_last_place(row: Row) -> None:
    x = np.linspace(-87, 88, 400_001, dtype=np.float32)
    x = np.concatenate([x, np.float32([0, -0.0, 1e-30, -1e-30, np.log(2) / 2, -np.log(2) / 2])])
    found = apply(row, Lanes.exp, x, (F32, F32), np.float32)
    exact = np.exp(x.astype(np.float64))
    ulps = np.abs(found - exact) / np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert ulps.max() < 2
    assert ulps.mean() < 0.5


def test_exp_of_nothing_is_exactly_one_and_far_below_exactly_zero(row: Row) -> None:
    x = np.float32([0, -0.0, -87.5, -100, -1e5, -np.inf])
    found = apply(row, Lanes.exp, x, (F32, F32), np.float32)
    np.testing.assert_array_equal(found, [1, 1, 0, 0, 0, 0])


def test_rounding_to_integers_takes_ties_to_even(row: Row) -> None:
    x = np.concatenate([np.arange(-100, 100, 0.25), [2**22 - 1, 1 - 2**22, 0.49999997]])
    values = x.astype(np.float32)
    found = apply(row, Lanes.round_to_i32, values, (F32, I32), np.int32)
    np.testing.assert_array_equal(found, np.rint(values).astype(np.int32))


def test_maximum_takes_the_second_where_the_first_is_nan(row: Row) -> None:
    def against_three(lanes: Lanes, x):
        return lanes.maximum(x, lanes.f.const(F32, 3.0))

    x = np.float32([1, 5, np.nan, -np.inf, np.inf])
    found = apply(row, against_three, x, (F32, F32), np.float32)
    np.testing.assert_array_equal(found, [3, 5, 3, 3, np.inf])


def test_the_tree_adds_in_the_order_of_the_ir(row: Row) -> None:
    def total(lanes: Lanes, x):
        return lanes.splat(lanes.tree(x))

    x = np.random.default_rng(1).standard_normal((500, LANES), np.float32)
    x *= np.float32(10) ** np.random.default_rng(2).integers(-6, 6, x.shape)
    found = apply(row, total, x.reshape(-1), (F32, F32), np.float32).reshape(x.shape)
    np.testing.assert_array_equal(found, np.repeat(tree_sum(x)[:, None], LANES, axis=1))


@pytest.mark.parametrize("count", [1, 2, 8, 16])
def test_trees_of_several_vectors_are_those_of_each(row: Row, count: int) -> None:
    def totals(lanes: Lanes, x):
        sums = lanes.trees([x * float(i + 1) for i in range(count)])
        return lanes.f.shuffle(sums, sums, [lane % count for lane in range(LANES)])

    x = np.random.default_rng(1).standard_normal((50, LANES), np.float32)
    found = apply(row, totals, x.reshape(-1), (F32, F32), np.float32).reshape(x.shape)
    factors = np.arange(1, count + 1, dtype=np.float32)
    expected = tree_sum(x[:, None] * factors[:, None])
    np.testing.assert_array_equal(found, np.tile(expected, LANES // count))


def test_the_tree_finds_the_largest_and_the_smallest(row: Row) -> None:
    rng = np.random.default_rng(3)
    floats = rng.standard_normal((200, LANES), np.float32)
    found = apply(
        row, lambda lanes, x: lanes.splat(lanes.tree(x, "max")), floats.reshape(-1), (F32, F32),
        np.float32,
    )  # fmt: skip
    np.testing.assert_array_equal(found.reshape(floats.shape)[:, 0], floats.max(axis=1))
    integers = rng.integers(-99, 99, (200, LANES)).astype(np.int32)
    found = apply(
        row, lambda lanes, x: lanes.splat(lanes.tree(x, "min")), integers.reshape(-1), (I32, I32),
        np.int32,
    )  # fmt: skip
    np.testing.assert_array_equal(found.reshape(integers.shape)[:, 0], integers.min(axis=1))


def test_the_int8_dot_takes_unsigned_weights_and_signed_activations(row: Row) -> None:
    rng = np.random.default_rng(4)
    quads = vector("i8", 8 * LANES)
    count = 200
    weights = rng.integers(0, 256, (count, LANES, 4), np.uint8)
    x = rng.integers(-128, 128, (count, LANES, 4), np.int8)
    joined = np.concatenate([weights.reshape(count, -1), x.view(np.uint8).reshape(count, -1)], 1)

    def dot(lanes: Lanes, both):
        f = lanes.f
        first = f.bitcast(f.shuffle(both, both, range(4 * LANES)), I32)
        second = f.bitcast(f.shuffle(both, both, range(4 * LANES, 8 * LANES)), I32)
        return lanes.dot_int8(f.const(I32, 7), first, second)

    words = joined.reshape(-1).view(np.uint64)  # so that LANES elements are one such vector
    found = apply(row, dot, words, (quads, I32), np.int32).reshape(count, LANES)
    expected = 7 + (weights.astype(np.int32) * x).sum(axis=2)
    np.testing.assert_array_equal(found, expected)


def test_int8_groups_are_rounded_like_the_reference_and_tiny_ones_to_zeros(row: Row) -> None:
    """127 / max|x| would overflow for a group near the smallest floats."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((100, LANES), np.float32)
    x[::10] *= np.float32(1e-38)
    x[5] = 0
    found = apply(
        row, lambda lanes, x: quantize_pair(lanes, (x, x))[0][0], x.reshape(-1), (F32, I32),
        np.int32,
    ).reshape(x.shape)  # fmt: skip
    largest = np.abs(x).max(axis=1, keepdims=True)
    inverse = np.where(largest > SMALLEST_GROUP, 127 / np.maximum(largest, SMALLEST_GROUP), 0)
    np.testing.assert_array_equal(found, np.rint(x * inverse.astype(np.float32)))

"""Weight formats and rounding to them."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.ir.formats import FORMATS, GROUP, SUPER, Weight, quantize


def relative_error(weight: Weight, values: np.ndarray) -> float:
    return float(np.linalg.norm(weight.dequantize() - values) / np.linalg.norm(values))


def normal(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 32), (5, 33), (70, 2080)])
@pytest.mark.parametrize("name", FORMATS)
def test_any_shape_keeps_it(name: str, shape: tuple[int, int]) -> None:
    values = normal(*shape)
    weight = quantize(values, name)
    assert weight.shape == shape
    assert weight.dequantize().shape == shape
    assert relative_error(weight, values) < 0.12


def test_rows_are_rounded_alike_whatever_surrounds_them() -> None:
    values = normal(300, 900)
    for name in FORMATS:
        whole, part = quantize(values, name), quantize(values[123:125], name)
        np.testing.assert_array_equal(whole.dequantize()[123:125], part.dequantize())


def test_error_is_clearly_below_that_of_rounding_to_the_largest_weight() -> None:
    values = normal(64, 1024)
    groups = values.reshape(64, -1, GROUP)
    low, high = groups.min(axis=2, keepdims=True), groups.max(axis=2, keepdims=True)
    q4_step, q8_step = (high - low) / 15, np.abs(groups).max(axis=2, keepdims=True) / 127
    plain_q4 = np.rint((groups - low) / q4_step) * q4_step + low
    plain_q8 = np.rint(groups / q8_step) * q8_step
    for name, plain in (("q4", plain_q4), ("q8", plain_q8)):
        plain_error = np.linalg.norm(plain - groups) / np.linalg.norm(groups)
        assert relative_error(quantize(values, name), values) < 0.93 * plain_error


@pytest.mark.parametrize(("name", "most"), [("q4_k", 0.945), ("q5_k", 0.955)])
def test_a_k_format_is_clearly_better_than_one_of_ranges(name: str, most: float) -> None:
    """Groups rounded to their range, its scale and minimum to 63 parts of their super-group's."""
    values = normal(32, 2048)
    groups = values.reshape(32, -1, SUPER // GROUP, GROUP)
    low = np.minimum(groups.min(axis=3, keepdims=True), 0)
    span = groups.max(axis=3, keepdims=True) - low
    levels = FORMATS[name].highest
    scale, minimum = in_63_parts(span / levels), -in_63_parts(-low)
    quants = np.clip(np.rint((groups - minimum) / scale), 0, levels)
    plain_error = np.linalg.norm(quants * scale + minimum - groups) / np.linalg.norm(groups)
    assert relative_error(quantize(values, name), values) < most * plain_error


def in_63_parts(values: np.ndarray) -> np.ndarray:
    """[N, supers, groups, 1] positive values, rounded to what a factor of 6 bits can say."""
    unit = (values.max(axis=2, keepdims=True) / 63).astype(np.float16).astype(np.float32)
    return np.rint(values / unit) * unit


@pytest.mark.parametrize("name", ["q4_k", "q5_k"])
def test_no_factor_beside_those_that_were_found_is_better(name: str) -> None:
    """One step of each group's factor of the scale, all else as it is and quants rounded anew."""
    values = normal(4, 512)
    weight = quantize(values, name)
    assert weight.scale_factors is not None
    found = errors_of_groups(weight, values)
    for step in (1, -1):
        factors = np.clip(weight.scale_factors.astype(int) + step, 0, 63).astype(np.uint8)
        planes = weight.planes() | {"scale_factors": factors}
        other = Weight(format=name, quants=weight.quants, **planes)
        scale, minimum = other.group_scales(), other.group_minimums()
        assert scale is not None
        assert minimum is not None
        wide = scale.repeat(GROUP, axis=1)
        rounded = np.rint((values - minimum.repeat(GROUP, axis=1)) / np.where(wide > 0, wide, 1))
        quants = np.clip(rounded, 0, FORMATS[name].highest).astype(np.uint8)
        error = errors_of_groups(Weight(format=name, quants=quants, **planes), values)
        assert np.mean(error < found) < 0.1  # the shared scale is fitted after the factors


def errors_of_groups(weight: Weight, values: np.ndarray) -> np.ndarray:
    squares = (weight.dequantize() - values).reshape(-1, GROUP) ** 2
    return squares.sum(axis=1)


@pytest.mark.parametrize("name", ["q4", "q8"])
def test_what_a_format_holds_exactly_stays_exact(name: str) -> None:
    rng = np.random.default_rng(1)
    low, high = (0, 16) if name == "q4" else (-127, 128)
    quants = rng.integers(low, high, (40, 96)).astype(FORMATS[name].quant_dtype)
    quants[:, 0::GROUP], quants[:, 1::GROUP] = low, high - 1  # the whole range is in use
    scales = rng.uniform(0.001, 0.1, (40, 3)).astype(np.float16)
    minimums = rng.uniform(-1, 1, (40, 3)).astype(np.float16) if name == "q4" else None
    weight = Weight(format=name, quants=quants, scales=scales, minimums=minimums)
    again = quantize(weight.dequantize(), name)
    np.testing.assert_array_equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("name", ["q4_k", "q5_k"])
def test_what_a_k_format_holds_exactly_stays_exact(name: str) -> None:
    rng = np.random.default_rng(1)
    highest = FORMATS[name].highest
    quants = rng.integers(0, highest + 1, (20, 512)).astype(np.uint8)
    quants[:, 0::GROUP], quants[:, 1::GROUP] = 0, highest  # the whole range is in use
    factors = rng.integers(20, 64, (2, 20, 16)).astype(np.uint8)
    factors[:, :, ::8] = 63
    weight = Weight(
        format=name,
        quants=quants,
        scales=rng.uniform(0.001, 0.01, (20, 2)).astype(np.float16),
        minimums=-rng.uniform(0.001, 0.01, (20, 2)).astype(np.float16),
        scale_factors=factors[0],
        minimum_factors=factors[1],
    )
    again = quantize(weight.dequantize(), name)
    np.testing.assert_array_equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("name", ["q4", "q8", "q4_k", "q5_k", "q6_k"])
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1e-30])
def test_constant_groups(name: str, value: float) -> None:
    values = np.full((2, 64), value, np.float32)
    np.testing.assert_allclose(quantize(values, name).dequantize(), values, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["q4", "q8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e30])
def test_group_that_cannot_be_held_shows_in_its_scale_and_spoils_no_other(
    name: str, value: float
) -> None:
    values = normal(1, 64)
    values[0, 5] = value
    weight = quantize(values, name)
    assert weight.scales is not None
    assert np.isfinite(weight.scales).tolist() == [[False, True]]


@pytest.mark.parametrize("name", ["q4_k", "q5_k", "q6_k"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e30])
def test_super_group_that_cannot_be_held_shows_in_its_scale_or_minimum(
    name: str, value: float
) -> None:
    values = normal(1, 512)
    values[0, 5] = value
    weight = quantize(values, name)
    assert weight.scales is not None
    is_finite = np.isfinite(weight.scales)
    if weight.minimums is not None:
        is_finite &= np.isfinite(weight.minimums)
    assert is_finite.tolist() == [[False, True]]


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_error_of_each_weight_is_bounded_by_the_range_of_its_group(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["q4", "q8"]))
    magnitude = 10.0 ** data.draw(st.integers(-3, 1))
    spikes = data.draw(st.integers(0, 8))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    group = rng.standard_normal((1, GROUP)) * magnitude
    group[0, :spikes] *= 100
    values = group.astype(np.float32)
    error = np.abs(quantize(values, name).dequantize() - values).max()
    span = np.ptp(values) / 15 if name == "q4" else np.abs(values).max() / 96
    assert error <= 1.2 * span


def test_bf16_is_rounded_to_nearest() -> None:
    values = normal(4, 100)
    weight = quantize(values, "bf16")
    np.testing.assert_array_equal(weight.quants, values.astype(ml_dtypes.bfloat16))


def test_rows_in_another_order() -> None:
    values = normal(6, 64)
    rows = np.array([5, 0, 3])
    for name in FORMATS:
        weight = quantize(values, name)
        taken = weight.take_rows(rows).dequantize()
        np.testing.assert_array_equal(taken, weight.dequantize()[rows])

"""The order of sums is a fact, not an outcome: other orders give other bits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.ir.order import LANES, lane_sum, tree_sum

sizes = st.integers(1, 100)
seeds = st.integers(0, 2**32 - 1)


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_the_tree_halves() -> None:
    a, b, c, d = (np.float32(x) for x in (1e8, 1.0, -1e8, 0.5))
    assert tree_sum(np.array([a, b, c, d])) == np.float32((a + c) + (b + d))
    assert tree_sum(np.array([a, c, b, d])) == np.float32((a + b) + (c + d)) != 1.5


@given(seeds)
def test_the_tree_takes_lane_l_and_l_plus_8_first(seed: int) -> None:
    lanes = random(seed, LANES)
    for half in (8, 4, 2, 1):
        lanes = np.array([lanes[i] + lanes[i + half] for i in range(half)])
    assert tree_sum(random(seed, LANES)) == lanes[0]


@given(seeds, sizes)
def test_lanes_are_summed_ascending_and_then_by_the_tree(seed: int, size: int) -> None:
    values = random(seed, size)
    lanes = [np.float32(0)] * LANES
    for index, value in enumerate(values):
        lanes[index % LANES] = lanes[index % LANES] + value
    assert lane_sum(values) == tree_sum(np.array(lanes))


@given(seeds, st.integers(0, 5), sizes)
def test_a_row_is_summed_alike_in_any_company(seed: int, rows: int, size: int) -> None:
    values = random(seed, rows, size)
    sums = lane_sum(values)
    assert sums.shape == (rows,)
    assert sums.dtype == np.float32
    assert all(lane_sum(row) == total for row, total in zip(values, sums, strict=True))


@given(seeds, sizes, sizes)
def test_zeros_behind_the_end_change_nothing(seed: int, size: int, more: int) -> None:
    values = random(seed, size)
    assert lane_sum(np.pad(values, (0, more))) == lane_sum(values)


@pytest.mark.parametrize("size", [16, 17, 1000])
def test_sums_are_near_the_exact_ones(size: int) -> None:
    values = random(size, size)
    assert lane_sum(values) == pytest.approx(float(values.sum(dtype=np.float64)), abs=1e-4)

"""From logits to a token: each step against the plainest way to compute it."""

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.ir.sampling import (
    RowSampling,
    Sampling,
    draw,
    penalize,
    sample,
    sample_row,
    threshold,
    uniform,
)

F32Array = npt.NDArray[np.float32]

GREEDY = RowSampling(
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
    seed=0,
    position=0,
    history_ids=np.zeros(0, np.int32),
    history_counts=np.zeros(0, np.int32),
)
seeds = st.integers(0, 2**32 - 1)


def weights_of(rng: np.random.Generator, size: int) -> F32Array:
    """Weights as `threshold` gets them: the largest is 1; many tie, and some are 0."""
    scores = rng.integers(-8, 1, size).astype(np.float32) * np.float32(0.7)
    if rng.random() < 0.5:
        scores += rng.random(size, np.float32)
    weights = np.exp(scores - scores.max())
    weights[rng.random(size) < 0.1] = 0
    weights[rng.integers(size)] = 1
    return weights


@pytest.mark.parametrize(
    ("seed", "outputs"),
    [  # published outputs of SplitMix64
        (0, [0xE220A8397B1DCDAF]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]),
    ],
)
def test_random_numbers_are_those_of_splitmix64(seed: int, outputs: list[int]) -> None:
    for position, output in enumerate(outputs):
        assert uniform(seed, position) == np.float32((output >> 40) / 2**24)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1))
def test_random_numbers_are_below_one(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1
    assert uniform(seed, position).dtype == np.float32


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_random_numbers_are_even(vary: str) -> None:
    numbers = [uniform(i, 7) if vary == "seed" else uniform(7, i) for i in range(4096)]
    counts, _ = np.histogram(numbers, bins=16, range=(0, 1))
    assert is_fair(counts, np.full(16, 4096 / 16))


def is_fair(counts: npt.NDArray[np.int64], expected: npt.NDArray[np.float64]) -> bool:
    """Pearson's chi-square, five standard deviations above its mean at most."""
    freedom = len(counts) - 1
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return chi_square <= freedom + 5 * math.sqrt(2 * freedom)


@given(seeds)
def test_penalties_follow_their_formulas(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(20, np.float32)
    ids = rng.choice(20, 6, replace=False).astype(np.int32)
    counts = rng.integers(0, 4, 6).astype(np.int32)
    row = replace(
        GREEDY,
        repetition_penalty=float(rng.uniform(0.5, 2)),
        frequency_penalty=float(rng.uniform(-2, 2)),
        presence_penalty=float(rng.uniform(-2, 2)),
        history_ids=ids,
        history_counts=counts,
    )
    expected = logits.astype(np.float64)
    for token, count in zip(ids.tolist(), counts.tolist(), strict=True):
        if expected[token] > 0:
            expected[token] /= row.repetition_penalty
        else:
            expected[token] *= row.repetition_penalty
        expected[token] -= row.frequency_penalty * count
        if count:
            expected[token] -= row.presence_penalty
    before = logits.copy()
    np.testing.assert_allclose(penalize(logits, row), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(logits, before)


def test_a_token_of_the_prompt_alone_is_only_repeated() -> None:
    row = replace(
        GREEDY,
        repetition_penalty=2.0,
        frequency_penalty=1.0,
        presence_penalty=1.0,
        history_ids=np.array([1], np.int32),
        history_counts=np.array([0], np.int32),
    )
    assert penalize(np.array([3, 3], np.float32), row).tolist() == [3, 1.5]


def kept_by_sorting(weights: F32Array, row: RowSampling) -> set[int]:
    """min_p, then top_k, then top_p, on a sorted list; ties with the last one kept stay."""
    ids = sorted(
        np.flatnonzero(weights >= np.float32(row.min_p)).tolist(), key=lambda i: -weights[i]
    )
    if row.top_k and row.top_k < len(ids):
        ids = [i for i in ids if weights[i] >= weights[ids[row.top_k - 1]]]
    mass, total = 0.0, float(weights[ids].sum(dtype=np.float64))
    if row.top_p < 1:
        for last in ids:
            mass += float(weights[last])
            if mass >= row.top_p * total * (1 - 1e-6):
                break
        ids = [i for i in ids if weights[i] >= weights[last]]
    return set(ids)


@given(
    seeds,
    st.integers(1, 200),
    st.integers(0, 210),
    st.sampled_from((1.0, 0.999, 0.9, 0.5, 0.01)),
    st.sampled_from((0.0, 1e-3, 0.1, 0.5, 1.0)),
)
def test_filters_keep_what_sorting_keeps(
    seed: int, size: int, top_k: int, top_p: float, min_p: float
) -> None:
    weights = weights_of(np.random.default_rng(seed), size)
    row = replace(GREEDY, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = np.flatnonzero(weights >= threshold(weights, row))
    expected = kept_by_sorting(weights, row)
    assert {i for i in kept.tolist() if weights[i] > 0} == {i for i in expected if weights[i] > 0}


@given(seeds, st.integers(1, 100), st.floats(0, 1, exclude_max=True, width=32))
def test_a_draw_is_an_id_whose_share_holds_the_number(seed: int, size: int, number: float) -> None:
    weights = weights_of(np.random.default_rng(seed), size)
    token = draw(weights, np.float32(number))
    edges = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
    assert weights[token] > 0
    assert edges[token] >= number - 1e-5
    assert token == 0 or edges[token - 1] <= number + 1e-5


def test_the_smallest_and_the_largest_number_draw_the_first_and_the_last_id() -> None:
    weights = np.zeros(100, np.float32)
    weights[[3, 40, 71]] = 1, 0.25, 0.5
    assert draw(weights, np.float32(0)) == 3
    assert draw(weights, np.float32(1 - 2**-24)) == 71


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_are_spread_as_the_softmax_says(temperature: float) -> None:
    logits = np.random.default_rng(5).standard_normal(40, np.float32)
    row = replace(GREEDY, temperature=temperature)
    tokens = [sample_row(logits, replace(row, seed=11, position=i)) for i in range(4000)]
    share = np.exp(logits.astype(np.float64) / temperature)
    expected = 4000 * share / share.sum()
    assert is_fair(np.bincount(tokens, minlength=40), expected)


def test_filtered_tokens_are_never_drawn() -> None:
    logits = np.linspace(0, 2, 50, dtype=np.float32)
    row = replace(GREEDY, temperature=1.0, top_k=5)
    tokens = {sample_row(logits, replace(row, position=i)) for i in range(300)}
    assert tokens == {45, 46, 47, 48, 49}


def test_greedy_takes_the_lowest_of_the_best() -> None:
    assert sample_row(np.array([0, 2, 1, 2], np.float32), GREEDY) == 1


def test_a_step_samples_every_row_by_its_own_parameters() -> None:
    logits = np.array([[0, 1, 2, 9], [5, 1, 2, 9]], np.float32)
    rows = [GREEDY, replace(GREEDY, temperature=1.0, top_k=1)]
    sampled = sample(logits, Sampling(rows=rows, vocab_size=3))  # the last id is no token
    assert sampled is not None
    assert sampled.tolist() == [2, 0]
    assert sampled.dtype == np.int32
    assert sample(logits, None) is None

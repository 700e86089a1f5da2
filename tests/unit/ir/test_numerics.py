"""The references against other ways to compute the same, most of them in float64."""

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.ir import numerics
from tokenmill.ir.formats import FORMATS, Weight, quantize
from tokenmill.ir.low_rank import FactorSlots
from tokenmill.ir.numerics import Cache, Place

F32Array = npt.NDArray[np.float32]
seeds = st.integers(0, 2**32 - 1)


def random(seed: int, *shape: int) -> F32Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def vector(values: F32Array) -> Weight:
    return Weight(format="f32", quants=values[None])


def place_of(*positions: int, blocks: tuple[int, ...] = (0, 1, 2)) -> Place:
    """Tokens of one sequence, in blocks of four positions."""
    return Place(
        positions_T=np.array(positions, np.int32),
        sequences_T=np.zeros(len(positions), np.int32),
        blocks_SB=np.array([blocks], np.int32),
        block_size=4,
    )


@given(seeds, st.sampled_from(list(FORMATS)), st.integers(1, 100), st.booleans())
def test_linear_multiplies_by_the_matrix(seed: int, form: str, k: int, has_bias: bool) -> None:
    weight, x, bias = quantize(random(seed, 9, k), form), random(seed + 1, 3, k), random(seed, 9)
    found = numerics.linear(x, weight, vector(bias) if has_bias else None)
    exact = x.astype(np.float64) @ weight.dequantize().T.astype(np.float64) + has_bias * bias
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.sqrt(k))


@pytest.mark.parametrize("form", FORMATS)
def test_embed_takes_rows_of_the_table(form: str) -> None:
    table = quantize(random(0, 7, 40), form)
    tokens = np.array([6, 0, 6], np.int32)
    np.testing.assert_array_equal(numerics.embed(tokens, table), table.dequantize()[[6, 0, 6]])


def test_rmsnorm_gives_rows_of_mean_square_one() -> None:
    x, weight = random(1, 4, 50) * 7, random(2, 50)
    found = numerics.rmsnorm(x, vector(weight), eps=1e-6)
    exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True)) * weight
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_bf16_is_rounded_to_nearest_even() -> None:
    x = random(3, 100)
    exact = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(numerics.round_to(x, to="bf16"), exact)
    half = np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    assert numerics.round_to(half, to="bf16").tolist() == [1, 1 + 2**-6]


@given(seeds, st.integers(1, 100))
def test_int8_is_off_by_half_a_step_of_its_group_at_most(seed: int, k: int) -> None:
    x = random(seed, 2, k)
    error = np.abs(numerics.round_to(x, to="int8") - x)
    for start in range(0, k, 32):
        group = slice(start, start + 32)
        step = np.abs(x[:, group]).max(1) / 127
        assert (error[:, group].max(1) <= step * 0.501).all()


def test_int8_of_zeros_and_of_next_to_nothing_is_zero() -> None:
    for size in (0.0, 1e-38, 1e-42):
        x = np.full((1, 40), size, np.float32)
        assert numerics.round_to(x, to="int8").tolist() == [[0.0] * 40]


@pytest.mark.parametrize("to", ["f32", "bf16", "int8"])
def test_no_rows_are_rounded_to_no_rows(to: str) -> None:
    assert numerics.round_to(np.zeros((0, 40), np.float32), to=to).shape == (0, 40)


@given(seeds, st.sampled_from((2, 8, 24)), st.integers(0, 500))
def test_rope_multiplies_by_a_complex_number(seed: int, head_dim: int, position: int) -> None:
    x = random(seed, 1, 3 * head_dim)
    found = numerics.rope(x, place_of(position), head_dim=head_dim, theta=10000.0)
    low, high = np.split(x.reshape(3, head_dim).astype(np.float64), 2, axis=1)
    angles = position * 10000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
    turned = (low + 1j * high) * np.exp(1j * angles)
    exact = np.concatenate([turned.real, turned.imag], axis=1).reshape(1, -1)
    np.testing.assert_allclose(found, exact, atol=3e-4)


def test_keys_and_values_lie_where_the_block_table_says() -> None:
    cache = Cache(
        keys=np.zeros((9, 4, 1, 2), np.float32), values=np.zeros((9, 4, 1, 2), np.float32)
    )
    k, v = random(1, 3, 2), random(2, 3, 2)
    place = place_of(3, 4, 9, blocks=(5, 0, 7))
    numerics.kv_write(k, v, place, cache, head_dim=2, to="bf16")
    for token, (block, offset) in enumerate([(5, 3), (0, 0), (7, 1)]):
        expected = numerics.round_to(k[token], to="bf16")
        np.testing.assert_array_equal(cache.keys[block, offset, 0], expected)
    assert np.count_nonzero(cache.values.any(axis=(2, 3))) == 3
    keys, values = cache.read(place, 0, 10)
    assert keys.shape == values.shape == (10, 1, 2)
    np.testing.assert_array_equal(values[9, 0], numerics.round_to(v[2], to="bf16"))


@given(
    seeds,
    st.sampled_from((1, 3)),
    st.sampled_from((1, 7, 300)),
    st.sampled_from((0, 1, 5, 44, 280)),
    st.sampled_from((0.0, 2.0)),
)
def test_attention_is_a_softmax_over_the_past(
    seed: int, group: int, length: int, window: int, cap: float
) -> None:
    kv_heads, head_dim, scale = 2, 4, 0.5
    blocks = tuple(np.random.default_rng(seed).permutation(75).tolist())
    cache = Cache(keys=random(seed, 75, 4, kv_heads, head_dim),
                  values=random(seed + 1, 75, 4, kv_heads, head_dim))  # fmt: skip
    place = place_of(length - 1, blocks=blocks)
    q = random(seed + 2, 1, kv_heads * group * head_dim)
    found = numerics.attention(
        q, cache, place, head_dim=head_dim, scale=scale, window=window, softcap=cap
    )
    keys, values = (a.astype(np.float64)[-window:] for a in cache.read(place, 0, length))
    for head, q_head in enumerate(q.reshape(-1, head_dim)):
        scores = keys[:, head // group] @ q_head * scale
        weights = np.exp(cap * np.tanh(scores / cap) if cap else scores)
        exact = weights @ values[:, head // group] / weights.sum()
        start = head * head_dim
        np.testing.assert_allclose(found[0, start : start + head_dim], exact, atol=2e-6)


def test_silu_does_not_overflow() -> None:
    x = np.array([-1e4, -1, 0, 1, 1e4], np.float32)
    exact = [0, -1 / (1 + np.e), 0, 1 / (1 + np.exp(-1)), 1e4]
    np.testing.assert_allclose(numerics.silu(x), exact, rtol=1e-6, atol=1e-30)


def test_what_a_window_does_not_see_is_of_no_account() -> None:
    cache = Cache(keys=random(1, 9, 4, 1, 4), values=random(2, 9, 4, 1, 4))
    place, q = place_of(10), random(3, 1, 4)
    found = numerics.attention(q, cache, place, head_dim=4, scale=1.0, window=5)
    cache.keys[0], cache.values[0] = 1e9, 1e9
    again = numerics.attention(q, cache, place, head_dim=4, scale=1.0, window=5)
    np.testing.assert_array_equal(found, again)


@given(seeds, st.sampled_from((0, 1, 4, 30)))
def test_attention_may_look_both_ways(seed: int, window: int) -> None:
    length, head_dim = 23, 4
    cache = Cache(keys=random(seed, 6, 4, 1, head_dim), values=random(seed + 1, 6, 4, 1, head_dim))
    place = place_of(*range(length), blocks=(3, 1, 4, 0, 5, 2))
    q = random(seed + 2, length, head_dim)
    found = numerics.attention(
        q, cache, place, head_dim=head_dim, scale=0.5, window=window, causal=False
    )
    keys, values = (a[:, 0].astype(np.float64) for a in cache.read(place, 0, length))
    distances = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    scores = np.where(distances < (window or length), q @ keys.T * 0.5, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    exact = weights @ values / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, exact, atol=2e-6)


@given(seeds, st.sampled_from((1, 5, 40)))
def test_each_head_is_normed_alone(seed: int, head_dim: int) -> None:
    x, weight = random(seed, 2, 3 * head_dim), random(seed + 1, head_dim)
    found = numerics.head_norm(x, vector(weight), head_dim=head_dim, eps=0.1)
    heads = x.reshape(2, 3, head_dim).astype(np.float64)
    exact = heads / np.sqrt(np.square(heads).mean(axis=2, keepdims=True) + 0.1) * weight
    np.testing.assert_allclose(found, exact.reshape(2, -1), atol=1e-5)


def test_a_pair_that_does_not_turn_does_not_grow() -> None:
    x, turns = random(1, 1, 4), (0.5, 0.0)
    found = numerics.rope(x, place_of(0), head_dim=4, frequencies=turns, magnitude=2.0)
    np.testing.assert_array_equal(found, x * np.array([2, 1, 2, 1], np.float32))


def test_gelu_is_that_of_tanh() -> None:
    x = np.array([-1e4, -3, -0.1, 0, 1, 1e4], np.float32)
    wide = x.astype(np.float64)
    inner = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    exact = 0.5 * wide * (1 + np.tanh(inner))
    np.testing.assert_allclose(numerics.gelu(x), exact, rtol=1e-5, atol=1e-30)


@given(seeds, st.integers(1, 4), st.booleans())
def test_a_mixture_is_the_weighted_sum_of_its_experts(seed: int, top_k: int, is_one: bool) -> None:
    count, size = 5, 7
    logits, x = random(seed, 6, count), random(seed + 1, 6, 4)
    weight = quantize(random(seed + 2, count * size, 4), "f32")
    routes = numerics.route(logits, top_k=top_k, renormalize=is_one)
    groups = numerics.group(routes)
    made = numerics.expert_linear(numerics.dispatch(x, groups), weight, groups)
    found = numerics.combine(made, routes, groups)
    experts = weight.dequantize().reshape(count, size, 4).astype(np.float64)
    chances = np.exp(logits.astype(np.float64))
    chances /= chances.sum(axis=1, keepdims=True)
    for t, row in enumerate(chances):
        best = np.argsort(-row)[:top_k]
        shares = row[best] / (row[best].sum() if is_one else 1)
        exact = sum(s * experts[e] @ x[t] for s, e in zip(shares, best, strict=True))
        np.testing.assert_allclose(found[t], exact, atol=1e-5)


def test_of_two_experts_alike_the_lower_number_is_chosen() -> None:
    routes = numerics.route(np.zeros((1, 4), np.float32), top_k=2, renormalize=True)
    assert routes.experts_TC.tolist() == [[0, 1]]
    assert routes.weights_TC.tolist() == [[0.5, 0.5]]


@given(seeds, st.integers(1, 80), st.integers(1, 9))
def test_adapters_add_a_low_rank_product_to_their_rows(seed: int, k: int, rank: int) -> None:
    x, y, adapters = (
        random(seed, 5, k),
        random(seed + 1, 5, 7),
        np.array([1, -1, 0, 2, 1], np.int32),
    )
    y[1, 0] = -0.0
    factors = {
        slot: (random(seed + 2, r, k), random(seed + 3, 7, r)) for slot, r in ((0, 1), (1, rank))
    }
    a, b = (
        FactorSlots(rank=rank, matrices=[*(factors[slot][i] for slot in (0, 1)), None])
        for i in (0, 1)
    )
    found = numerics.expand(y, numerics.shrink(x, a, adapters), b, adapters)
    for row, slot in enumerate(adapters.tolist()):
        if slot in factors:
            down, up = (factor.astype(np.float64) for factor in factors[slot])
            exact = y[row] + up @ (down @ x[row].astype(np.float64))
            assert np.abs(found[row] - exact).max() < 1e-4 * (1 + np.abs(exact).max())
        else:
            assert found[row].tobytes() == y[row].tobytes()

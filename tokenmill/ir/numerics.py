"""What each operation computes, in NumPy: the reference that every backend is held against.

Plain and slow. Sums follow `order.py`; results are float32 unless an operation rounds them.
Shape suffixes: T tokens, R rows, S sequences, K inputs, N outputs, H query heads, G key heads,
D dimensions a head, P positions, E experts, C experts that a token chooses.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tokenmill.ir.formats import FORMATS, Weight
from tokenmill.ir.low_rank import FactorSlots
from tokenmill.ir.order import GROUP, KV_CHUNK, F32Array, lane_sum, stored_dims

IntArray = npt.NDArray[np.int32]

SMALLEST_GROUP = 1e-36
"""A group of activations with no larger one is rounded to zeros: 127 / max|x| would overflow."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where each token stands: its position, its sequence, and that sequence's blocks.

    Caches of layers with a window may have blocks of their own.
    """

    positions_T: IntArray
    sequences_T: IntArray
    blocks_SB: IntArray
    block_size: int
    window_blocks_SB: IntArray | None = None
    segments_T: IntArray | None = None  # which of two texts each is of; None: all of the first

    def table(self, *, is_windowed: bool) -> IntArray:
        """The blocks [S, B] of one kind of cache."""
        own = self.window_blocks_SB if is_windowed else None
        return self.blocks_SB if own is None else own


@dataclass(frozen=True, kw_only=True)
class Cache:
    """One layer's keys and values, [blocks, block_size, G, D] float32, rounded when stored."""

    keys: F32Array
    values: F32Array
    is_windowed: bool = False

    def read(self, place: Place, sequence: int, length: int) -> tuple[F32Array, F32Array]:
        """The first `length` positions of a sequence: two [P, G, D]."""
        table = place.table(is_windowed=self.is_windowed)
        blocks = table[sequence, : -(-length // place.block_size)]
        heads = self.keys.shape[2:]
        keys = self.keys[blocks].reshape(-1, *heads)[:length]
        return keys, self.values[blocks].reshape(-1, *heads)[:length]


def embed(tokens_T: IntArray, table: Weight) -> F32Array:
    return table.take_rows(tokens_T).dequantize()


def embed_place(place: Place, table: Weight, *, by: str, offset: int = 0) -> F32Array:
    """A row of the table for each token, `by` its position or by its segment."""
    rows = place.positions_T if by == "position" else place.segments_T
    rows = np.zeros_like(place.positions_T) if rows is None else rows
    return table.take_rows(rows + offset).dequantize()


def rmsnorm(x_TK: F32Array, weight: Weight, *, eps: float) -> F32Array:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019)."""
    mean_T = lane_sum(x_TK * x_TK) / np.float32(x_TK.shape[-1])
    scale_T = np.float32(1.0) / np.sqrt(mean_T + np.float32(eps))
    out_TK: F32Array = x_TK * scale_T[:, None] * weight.dequantize()[0]
    return out_TK


def layer_norm(
    x_TK: F32Array, weight: Weight, bias: Weight | None = None, *, eps: float
) -> F32Array:
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba, Kiros and Hinton 2016)."""
    size = np.float32(x_TK.shape[-1])
    x_TK = x_TK - (lane_sum(x_TK) / size)[:, None]
    scale_T = np.float32(1.0) / np.sqrt(lane_sum(x_TK * x_TK) / size + np.float32(eps))
    out_TK: F32Array = x_TK * scale_T[:, None] * weight.dequantize()[0]
    return out_TK if bias is None else out_TK + bias.dequantize()[0]


def head_norm(x_TN: F32Array, weight: Weight, *, head_dim: int, eps: float) -> F32Array:
    """rmsnorm of each head alone; all heads share the weights [D]."""
    x_MD = x_TN.reshape(-1, head_dim)
    return rmsnorm(x_MD, weight, eps=eps).reshape(x_TN.shape)


def round_to(x: F32Array, *, to: str) -> F32Array:
    """Round to an activation type and back. int8: groups of GROUP, scale = max|x| / 127."""
    if to == "f32":
        return x
    if to == "bf16":
        return x.astype(ml_dtypes.bfloat16).astype(np.float32)
    k = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -k % GROUP)])
    groups = padded.reshape(*x.shape[:-1], padded.shape[-1] // GROUP, GROUP)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    zero = np.zeros_like(largest)
    inverse = np.divide(np.float32(127), largest, out=zero, where=largest > SMALLEST_GROUP)
    rounded: F32Array = np.rint(groups * inverse) * (largest / np.float32(127))
    return rounded.reshape(padded.shape)[..., :k]


def linear(x_TK: F32Array, weight: Weight, bias: Weight | None = None) -> F32Array:
    """x @ weight.T (+ bias), group by group of k."""
    quants_NK = weight.quants.astype(np.float32)
    scales_NG, minimums_NG = weight.group_scales(), weight.group_minimums()
    size = FORMATS[weight.format].group
    out_TN = np.zeros((x_TK.shape[0], quants_NK.shape[0]), np.float32)
    for group, start in enumerate(range(0, x_TK.shape[1], size)):
        x = x_TK[:, start : start + size]
        dot_TN = x @ quants_NK[:, start : start + size].T
        out_TN += dot_TN if scales_NG is None else scales_NG[:, group] * dot_TN
        if minimums_NG is not None:
            out_TN += minimums_NG[:, group] * x.sum(1)[:, None]
    return out_TN if bias is None else out_TN + bias.dequantize()[0]


def shrink(x_TK: F32Array, weight: FactorSlots, adapters_T: IntArray) -> F32Array:
    """A x, each row with its adapter's A [R, K] (Hu et al. 2021); zeros beyond its rank."""
    low_TR = np.zeros((len(x_TK), weight.rank), np.float32)
    for rows, a_RK in weight.rows(adapters_T):
        low_TR[rows, : len(a_RK)] = lane_sum(x_TK[rows, None, :] * a_RK)
    return low_TR


def expand(y_TN: F32Array, low_TR: F32Array, weight: FactorSlots, adapters_T: IntArray) -> F32Array:
    """y + B (A x), each row with its adapter's B [N, R]; rows that have none stay as they are."""
    out_TN = y_TN.copy()
    for rows, b_NR in weight.rows(adapters_T):
        delta = np.zeros((len(rows), len(b_NR)), np.float32)
        for rank, b_N in enumerate(b_NR.T):
            delta += low_TR[rows, rank, None] * b_N
        out_TN[rows] += delta
    return out_TN


def rope_frequencies(head_dim: int, theta: float) -> F32Array:
    """[head_dim / 2] radians a position, in float32, as the models were trained with.

    Powers are rounded once, as torch's are: those that NumPy computes in float32 are off by a
    last bit here and there, an error that grows with the position.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(theta, exponents, dtype=np.float64).astype(np.float32)
    frequencies: F32Array = np.float32(1) / powers
    return frequencies


@dataclass(frozen=True, kw_only=True)
class Angles:
    """How fast each pair of a head turns, in radians a position, and how much it grows.

    A pair of frequency 0 stays as it is.
    """

    frequencies: tuple[float, ...]
    magnitude: float = 1.0

    @staticmethod
    def of(
        head_dim: int,
        theta: float | None = None,
        frequencies: tuple[float, ...] = (),
        magnitude: float = 1.0,
    ) -> "Angles":
        """Those of a `rope` operation, from its attributes."""
        if theta is not None:
            frequencies = tuple(map(float, rope_frequencies(head_dim, theta)))
        return Angles(frequencies=frequencies, magnitude=magnitude)

    def turns(self, positions: npt.NDArray[np.integer]) -> tuple[F32Array, F32Array]:
        """Cosines and sines, [positions, head_dim / 2] each."""
        frequencies = np.array(self.frequencies, np.float32)
        angles = positions.astype(np.float32)[:, None] * frequencies
        size = np.where(frequencies != 0, np.float32(self.magnitude), np.float32(1))
        return np.cos(angles) * size, np.sin(angles) * size


def rope(
    x_TN: F32Array,
    place: Place,
    *,
    head_dim: int,
    theta: float | None = None,
    frequencies: tuple[float, ...] = (),
    magnitude: float = 1.0,
) -> F32Array:
    """Rotary embedding over halves: (d, d + D/2) turn together (Su et al. 2021)."""
    turns = Angles.of(head_dim, theta, frequencies, magnitude).turns(place.positions_T)
    cos, sin = (turn[:, None] for turn in turns)
    x_THD = x_TN.reshape(x_TN.shape[0], -1, head_dim)
    low, high = np.split(x_THD, 2, axis=2)
    turned = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=2)
    return turned.reshape(x_TN.shape)


def kv_write(
    k_TN: F32Array,
    v_TN: F32Array,
    place: Place,
    cache: Cache,
    *,
    head_dim: int,
    to: str,
    window: int = 0,
) -> Cache:
    """Store keys and values at each token's place, rounded to the cache's type.

    With a `window`, what lies before it will not be read again.
    """
    assert cache.is_windowed == bool(window)
    block_T, offset_T = np.divmod(place.positions_T, place.block_size)
    block_T = place.table(is_windowed=cache.is_windowed)[place.sequences_T, block_T]
    shape = (len(k_TN), -1, head_dim)
    keys, values = k_TN.reshape(shape), v_TN.reshape(shape)
    cache.keys[block_T, offset_T] = round_heads(keys, to=to, is_turned=True)
    cache.values[block_T, offset_T] = round_heads(values, to=to, is_turned=False)
    return cache


def round_heads(x_TGD: F32Array, *, to: str, is_turned: bool) -> F32Array:
    """Round heads in the order in which the cache stores their dimensions."""
    dims = stored_dims(x_TGD.shape[-1], is_turned=is_turned)
    stored = np.where(dims >= 0, x_TGD[..., dims], np.float32(0))
    rounded = np.empty_like(x_TGD)
    rounded[..., dims[dims >= 0]] = round_to(stored, to=to)[..., dims >= 0]
    return rounded


def attention(
    q_TN: F32Array,
    cache: Cache,
    place: Place,
    *,
    head_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
) -> F32Array:
    """Attention of each token over its sequence's cache, heads grouped.

    If `causal`, up to its own position; else up to the last that its sequence has in this step.
    With a `window`, a token sees only positions that are less than so far from its own; with a
    `softcap`, scores are bent to stay within it.
    """
    out_TN = np.empty_like(q_TN)
    for t, (sequence, own) in enumerate(zip(place.sequences_T, place.positions_T, strict=True)):
        last = own if causal else place.positions_T[place.sequences_T == sequence].max()
        last = min(last, own + window - 1) if window else last
        keys, values = cache.read(place, int(sequence), int(last) + 1)
        q_GHD = q_TN[t].reshape(keys.shape[1], -1, head_dim)
        first = max(0, int(own) + 1 - window) if window else 0
        out_TN[t] = _attend(q_GHD, keys, values, first, scale, softcap).reshape(-1)
    return out_TN


def _attend(
    q_GHD: F32Array, k_PGD: F32Array, v_PGD: F32Array, first: int, scale: float, softcap: float
) -> F32Array:
    """One token, chunk after chunk, by the online softmax (Milakov and Gimelshein 2018)."""
    top = np.full(q_GHD.shape[:2], -np.inf, np.float32)
    total, out = np.zeros_like(top), np.zeros_like(q_GHD)
    for start in range(first - first % KV_CHUNK, len(k_PGD), KV_CHUNK):
        begin = max(start, first)
        keys, values = k_PGD[begin : start + KV_CHUNK], v_PGD[begin : start + KV_CHUNK]
        scores = np.einsum("ghd,pgd->ghp", q_GHD, keys) * np.float32(scale)
        if softcap:
            scores = bent(scores, cap=softcap)
        chunk_top = scores.max(axis=2)
        weights = np.exp(scores - chunk_top[:, :, None])
        new_top = np.maximum(top, chunk_top)
        old, new = np.exp(top - new_top), np.exp(chunk_top - new_top)
        lanes = np.pad(weights, ((0, 0), (0, 0), (begin - start, 0)))
        total = total * old + lane_sum(lanes) * new
        chunk_out = np.einsum("ghp,pgd->ghd", weights, values)
        out = out * old[:, :, None] + chunk_out * new[:, :, None]
        top = new_top
    return out / total[:, :, None]


def silu(x: F32Array) -> F32Array:
    """x * sigmoid(x)."""
    with np.errstate(over="ignore"):
        out: F32Array = np.divide(x, np.float32(1) + np.exp(-x))
    return out


def gelu(x: F32Array) -> F32Array:
    """x * Phi(x), by tanh (Hendrycks and Gimpel 2016): 0.5 (1 + tanh u) is sigmoid(2u)."""
    u = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    with np.errstate(over="ignore"):
        out: F32Array = np.divide(x, np.float32(1) + np.exp(np.float32(-2) * u))
    return out


def gelu_erf(x: F32Array) -> F32Array:
    """x * Phi(x), the normal distribution by its error function."""
    scaled = (x / np.sqrt(2)).astype(np.float64)
    erf = np.frompyfunc(math.erf, 1, 1)(scaled).astype(np.float64)
    out: F32Array = (x * (0.5 + 0.5 * erf)).astype(np.float32)
    return out


def scale(x: F32Array, *, by: float) -> F32Array:
    return x * np.float32(by)


def bent(x: F32Array, *, cap: float) -> F32Array:
    """cap * tanh(x / cap): nearly x where that is small, never beyond cap."""
    out: F32Array = np.tanh(x / np.float32(cap)) * np.float32(cap)
    return out


@dataclass(frozen=True, kw_only=True)
class Routes:
    """The experts of each token, the one of most weight first."""

    num_experts: int
    experts_TC: IntArray
    weights_TC: F32Array


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Pairs of token and expert, ordered by expert and then by token."""

    starts: IntArray  # [E + 1]: expert e has the rows [starts[e], starts[e + 1])
    places_TC: IntArray  # the row of each pair

    def tokens(self) -> IntArray:
        """[T * C] the token of each row."""
        tokens = np.empty(self.places_TC.size, np.int32)
        tokens[self.places_TC] = np.arange(len(self.places_TC), dtype=np.int32)[:, None]
        return tokens


def route(logits_TE: F32Array, *, top_k: int, renormalize: bool) -> Routes:
    """The `top_k` most likely experts by softmax; of two alike, the lower number."""
    exps_TE = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
    chances_TE = exps_TE / lane_sum(exps_TE)[:, None]
    experts_TC = np.argsort(-chances_TE, axis=1, kind="stable")[:, :top_k].astype(np.int32)
    weights_TC = np.take_along_axis(chances_TE, experts_TC, axis=1)
    if renormalize:
        weights_TC = weights_TC / np.cumsum(weights_TC, axis=1, dtype=np.float32)[:, -1:]
    return Routes(num_experts=logits_TE.shape[1], experts_TC=experts_TC, weights_TC=weights_TC)


def group(routes: Routes) -> Groups:
    chosen = routes.experts_TC.reshape(-1)
    places = np.empty(len(chosen), np.int32)
    places[np.argsort(chosen, kind="stable")] = np.arange(len(chosen), dtype=np.int32)
    counts = np.bincount(chosen, minlength=routes.num_experts)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return Groups(starts=starts, places_TC=places.reshape(routes.experts_TC.shape))


def dispatch(x_TK: F32Array, groups: Groups) -> F32Array:
    """[T, C, K]: each expert's rows together."""
    return x_TK[groups.tokens()].reshape(*groups.places_TC.shape, -1)


def expert_linear(x_TCK: F32Array, weight: Weight, groups: Groups) -> F32Array:
    """Each expert's rows by its own share of the weight [E * N, K]."""
    rows = x_TCK.reshape(-1, x_TCK.shape[-1])
    n = weight.shape[0] // (len(groups.starts) - 1)
    out = np.empty((len(rows), n), np.float32)
    for expert, (start, stop) in enumerate(pairwise(groups.starts.tolist())):
        if start < stop:
            own = weight.take_rows(np.arange(expert * n, (expert + 1) * n))
            out[start:stop] = linear(rows[start:stop], own)
    return out.reshape(*x_TCK.shape[:-1], n)


def combine(y_TCN: F32Array, routes: Routes, groups: Groups) -> F32Array:
    """The weighted sum of what a token's experts made, the one of most weight first."""
    rows = y_TCN.reshape(-1, y_TCN.shape[-1])
    out_TN = np.zeros((len(y_TCN), y_TCN.shape[-1]), np.float32)
    for places_T, weights_T in zip(groups.places_TC.T, routes.weights_TC.T, strict=True):
        out_TN += weights_T[:, None] * rows[places_T]
    return out_TN


def add(a: F32Array, b: F32Array) -> F32Array:
    return a + b


def mul(a: F32Array, b: F32Array) -> F32Array:
    return a * b


def select_rows(x_TK: F32Array, rows_R: IntArray) -> F32Array:
    return x_TK[rows_R]

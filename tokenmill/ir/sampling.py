"""How a row of logits becomes a token, in NumPy: the reference for the compiled sampler.

A row's draw depends on its logits, its parameters and (seed, position), on nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tokenmill.ir.order import LANES, F32Array, lane_sum, tree_sum

_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class RowSampling:
    """The sampling parameters of one row; see `backends.base.SampleInput`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int
    position: int
    history_ids: npt.NDArray[np.int32]
    history_counts: npt.NDArray[np.int32]
    bias_ids: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    bias_values: F32Array = field(default_factory=lambda: np.zeros(0, np.float32))
    is_allowed: npt.NDArray[np.bool_] | None = None  # [V]; None: every token is


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the rows of a step are sampled, and how many ids of the logits are tokens."""

    rows: Sequence[RowSampling]
    vocab_size: int


def sample(logits_RV: F32Array, sampling: Sampling | None) -> npt.NDArray[np.int32] | None:
    """The token of each row; None where the step only goes forward."""
    if sampling is None:
        return None
    pairs = zip(logits_RV[:, : sampling.vocab_size], sampling.rows, strict=True)
    return np.array([sample_row(logits, row) for logits, row in pairs], np.int32)


def uniform(seed: int, position: int) -> np.float32:
    """A number in [0, 1) from (seed, position): SplitMix64 (Steele et al. 2014), top 24 bits."""
    x = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return np.float32((x ^ (x >> 31)) >> 40) * np.float32(2.0**-24)


def restrict(logits: F32Array, row: RowSampling) -> F32Array:
    """Forbid what the mask does not allow, then add the biases."""
    allowed = row.is_allowed
    out = logits.copy() if allowed is None else np.where(allowed, logits, np.float32(-np.inf))
    out[row.bias_ids] += row.bias_values
    return out


def penalize(logits: F32Array, row: RowSampling) -> F32Array:
    """Repetition penalty (Keskar et al. 2019), then OpenAI's frequency and presence ones."""
    out = logits.copy()
    values = out[row.history_ids]
    repeated = np.float32(row.repetition_penalty)
    values = np.where(values > 0, values / repeated, values * repeated)
    counts = row.history_counts.astype(np.float32)
    values = values - np.float32(row.frequency_penalty) * counts
    out[row.history_ids] = values - np.float32(row.presence_penalty) * (counts > 0)
    return out


def sample_row(logits: F32Array, row: RowSampling) -> int:
    """The token that a row [V] of logits gives."""
    scores = penalize(restrict(logits, row), row)
    if row.temperature == 0:
        return int(np.argmax(scores))
    scores = scores * (np.float32(1) / np.float32(row.temperature))
    weights = np.exp(scores - scores.max())
    weights[weights < threshold(weights, row)] = 0
    return draw(weights, uniform(row.seed, row.position))


def threshold(weights: F32Array, row: RowSampling) -> np.float32:
    """The smallest weight (the largest is 1) that min_p, then top_k, then top_p let through.

    Weights that tie with the threshold are all kept.
    """
    least = np.float32(row.min_p)
    if 0 < row.top_k < len(weights):
        least = max(least, np.partition(weights, -row.top_k)[-row.top_k])
    if row.top_p < 1:
        least = max(least, _nucleus(weights, least, row.top_p))
    return least


def _nucleus(weights: F32Array, least: np.float32, top_p: float) -> np.float32:
    """The largest threshold whose weights still hold `top_p` of the mass above `least`."""
    wanted = np.float32(top_p) * _mass(weights, least)
    candidates = np.unique(weights[weights >= least])
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if _mass(weights, candidates[middle]) >= wanted:
            low = middle
        else:
            high = middle - 1
    return np.float32(candidates[low])


def _mass(weights: F32Array, least: np.float32) -> np.float32:
    return np.float32(lane_sum(np.where(weights >= least, weights, np.float32(0))))


def draw(weights: F32Array, number: np.float32) -> int:
    """The first id at which the running sum of weights passes number * total.

    The sum runs over vectors of LANES ids, each summed by the tree, then within one vector.
    """
    short = -len(weights) % LANES
    vectors = np.pad(weights, (0, short)).reshape(-1, LANES)
    sums = np.cumsum(tree_sum(vectors), dtype=np.float32)
    target = number * sums[-1]
    index = int(np.argmax(sums > target)) if sums[-1] > target else len(sums) - 1
    running = sums[index - 1] if index else np.float32(0)
    last = 0
    for lane, weight in enumerate(vectors[index]):
        if weight > 0:
            last = lane
            running = running + weight
            if running > target:
                break
    return index * LANES + last

"""Random sampling parameters, and the tokens that they may lead to."""

from dataclasses import replace
from itertools import product

import numpy as np

from tokenmill.backends.base import F32Array, I32Array, SampleInput
from tokenmill.ir.sampling import RowSampling, draw, penalize, sample_row, threshold, uniform

_NEAR = (1 - 2e-6, 1.0, 1 + 2e-6)


def random_sampling(
    rng: np.random.Generator, slots: I32Array, positions: I32Array, vocab_size: int
) -> SampleInput:
    """Parameters of every kind for some rows; a third of the rows is greedy."""
    count = len(slots)

    def either(off: float, low: float, high: float) -> F32Array:
        is_off = rng.random(count) < 0.5
        return np.where(is_off, off, rng.uniform(low, high, count)).astype(np.float32)

    lengths = rng.integers(0, min(vocab_size, 12), count)
    ids = [rng.choice(vocab_size, n, replace=False) for n in lengths]
    return SampleInput(
        slots=slots,
        temperature=np.where(rng.random(count) < 1 / 3, 0, either(1, 0.2, 3)).astype(np.float32),
        top_k=either(0, 1, vocab_size + 4).astype(np.int32),
        top_p=either(1, 0.05, 1),
        min_p=either(0, 0, 1),
        repetition_penalty=either(1, 0.5, 2),
        frequency_penalty=either(0, -2, 2),
        presence_penalty=either(0, -2, 2),
        seeds=rng.integers(0, 2**64, count, np.uint64),
        positions=positions,
        history_starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        history_ids=np.concatenate([np.empty(0), *ids]).astype(np.int32),
        history_counts=rng.integers(0, 4, lengths.sum()).astype(np.int32),
    )


def possible_tokens(logits: F32Array, row: RowSampling) -> set[int]:
    """The tokens that a row [V] may give when `exp` and sums are good to the last bits."""
    if row.temperature == 0:
        return {sample_row(logits, row)}
    scores = penalize(logits, row) * (np.float32(1) / np.float32(row.temperature))
    weights = np.exp(scores - scores.max())
    found = set()
    for p, least, number in product(_NEAR, _NEAR, _NEAR):
        kept = weights.copy()
        top_p = row.top_p * p if row.top_p < 1 else 1.0
        kept[weights < threshold(weights, replace(row, top_p=top_p)) * least] = 0
        found.add(draw(kept, uniform(row.seed, row.position) * np.float32(number)))
    return found

"""Random traffic: sequences of tokens, and the steps in which they are computed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tokenmill.backends.base import (
    BLOCK_SIZE,
    CompiledModel,
    F32Array,
    I32Array,
    SampleInput,
    StepInput,
    StepLimits,
)

Rng = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The tokens [start, start + length) of a sequence."""

    sequence: int
    start: int
    length: int


Steps = tuple[tuple[Chunk, ...], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Traffic:
    """Sequences of token ids, their block tables [sequences, B], and the steps.

    Layers with a window have blocks of their own, if `window_tables` are given. `adapters` gives
    each sequence's slot, if there are any.
    """

    sequences: tuple[I32Array, ...]
    tables: I32Array
    steps: Steps
    window: int = 0
    window_tables: I32Array | None = None
    adapters: I32Array | None = None


def make_limits(
    vocab_size: int,
    *,
    tokens: int = 64,
    blocks: int = 24,
    window: int = 0,
    adapter_slots: int = 0,
) -> StepLimits:
    """Room for four sequences; one of them may take all but a few blocks."""
    return StepLimits(
        window=window,
        window_blocks=blocks + 3 if window else 0,
        tokens=tokens,
        sequences=4,
        rows=tokens,
        blocks=blocks,
        blocks_per_sequence=blocks,
        slots=4,
        vocab_size=vocab_size,
        adapter_slots=adapter_slots,
    )


def random_traffic(rng: Rng, limits: StepLimits, lengths: Sequence[int]) -> Traffic:
    """Sequences of these lengths over shuffled blocks, computed in random chunks."""
    sequences = tuple(rng.integers(0, limits.vocab_size, n, np.int32) for n in lengths)
    return Traffic(
        sequences=sequences,
        tables=shuffled_tables(rng, limits, lengths),
        steps=random_steps(rng, lengths, limits.tokens),
        window=limits.window,
        window_tables=window_tables(rng, limits, lengths),
    )


def window_tables(rng: Rng, limits: StepLimits, lengths: Sequence[int]) -> I32Array | None:
    """Tables in the pool of layers with a window, if there is one."""
    if not limits.window_blocks:
        return None
    return shuffled_tables(rng, replace(limits, blocks=limits.window_blocks), lengths)


def shuffled_tables(rng: Rng, limits: StepLimits, lengths: Sequence[int]) -> I32Array:
    """Blocks for each sequence from anywhere in the pool; entries that are not used are 0."""
    blocks = rng.permutation(limits.blocks).astype(np.int32)
    tables = np.zeros((len(lengths), limits.blocks_per_sequence), np.int32)
    taken = 0
    for table, length in zip(tables, lengths, strict=True):
        needed = -(-length // BLOCK_SIZE)
        table[:needed] = blocks[taken : taken + needed]
        taken += needed
    return tables


def random_steps(rng: Rng, lengths: Sequence[int], max_tokens: int) -> Steps:
    """Every token once and in order: chunks of a prompt, then a few tokens one by one."""
    done = [0] * len(lengths)
    steps = []
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        chunks: list[Chunk] = []
        for index in rng.permutation(len(lengths)).tolist():
            left = max_tokens - sum(c.length for c in chunks)
            rest = min(lengths[index] - done[index], left)
            if rest > 0 and rng.random() < 0.7:
                length = int(rng.choice([1, rng.integers(1, rest + 1), rest]))
                chunks.append(Chunk(sequence=index, start=done[index], length=length))
                done[index] += length
        if chunks:
            steps.append(tuple(chunks))
    return tuple(steps)


def make_step(
    traffic: Traffic,
    chunks: Sequence[Chunk],
    *,
    sampling: SampleInput | None = None,
    are_last_rows: bool = False,
) -> StepInput:
    """The arrays of a step; logits are wanted of all its tokens or of each chunk's last."""
    lengths = np.array([c.length for c in chunks], np.int32)
    ends = np.cumsum(lengths, dtype=np.int32)
    spans = [(traffic.sequences[c.sequence], c.start, c.start + c.length) for c in chunks]
    return StepInput(
        tokens=np.concatenate([tokens[start:stop] for tokens, start, stop in spans]),
        positions=np.concatenate([np.arange(a, b, dtype=np.int32) for _, a, b in spans]),
        sequences=np.repeat(np.arange(len(chunks), dtype=np.int32), lengths),
        block_tables=traffic.tables[[c.sequence for c in chunks]],
        rows=ends - 1 if are_last_rows else np.arange(ends[-1], dtype=np.int32),
        sampling=sampling,
        want_logits=True,
        window_tables=_seen_tables(traffic, chunks),
        adapters=_adapters(traffic, chunks, lengths),
    )


def _adapters(traffic: Traffic, chunks: Sequence[Chunk], lengths: I32Array) -> I32Array | None:
    if traffic.adapters is None:
        return None
    return np.repeat(traffic.adapters[[c.sequence for c in chunks]], lengths)


def _seen_tables(traffic: Traffic, chunks: Sequence[Chunk]) -> I32Array | None:
    """The tables of layers with a window; blocks that no token sees any more are another's."""
    if traffic.window_tables is None:
        return None
    tables = traffic.window_tables[[c.sequence for c in chunks]].copy()
    for table, chunk in zip(tables, chunks, strict=True):
        first = max(0, chunk.start + 1 - traffic.window) // BLOCK_SIZE
        table[:first] = traffic.window_tables[0, 0]
    return tables


def run_traffic(model: CompiledModel, traffic: Traffic) -> list[F32Array]:
    """The logits [positions, vocab_size] of each sequence at the positions that are computed."""
    found: list[list[F32Array]] = [[] for _ in traffic.sequences]
    for chunks in traffic.steps:
        model.post(make_step(traffic, chunks))
        logits = model.wait().logits
        assert logits is not None
        ends = np.cumsum([c.length for c in chunks])[:-1]
        for chunk, rows in zip(chunks, np.split(logits.copy(), ends), strict=True):
            found[chunk.sequence].append(rows)
    return [np.concatenate(rows) for rows in found]


def soil_cache(model: CompiledModel, rng: Rng) -> None:
    """Leave other sequences' keys and values in every block of the pool."""
    limits = model.limits
    capacity = min(limits.blocks_per_sequence, limits.blocks // 2) * BLOCK_SIZE
    run_traffic(model, random_traffic(rng, limits, (capacity, capacity)))

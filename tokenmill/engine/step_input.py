"""Turns a planned step into the arrays that a compiled model reads.

What stays the same from step to step (block tables, sampling parameters) is kept in arrays
with a row per slot and gathered; only what is new is written. T tokens, S sequences, R rows.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from tokenmill.backends.base import (
    BiasInput,
    I32Array,
    LogprobInput,
    MaskInput,
    SampleInput,
    StepInput,
    StepLimits,
)
from tokenmill.engine.sequence import NO_SLOT, Sequence
from tokenmill.engine.step import Chunk, Step


class _Row(NamedTuple):
    """A row of logits, at one token of a chunk: it samples the next, or scores the one there is."""

    chunk: Chunk
    token: int  # index in the step's tokens
    position: int  # in the sequence
    num_guessed: int  # drafts up to this token
    is_sampled: bool


class StepBuilder:
    """Builds every step of one engine, in order; each StepInput owns its arrays."""

    def __init__(self, limits: StepLimits) -> None:
        slots = limits.slots
        self._has_adapters = limits.adapter_slots > 0
        self._tables: list[list[int] | None] = [None] * slots  # whose blocks a slot's row shows
        self._num_shown = [0] * slots
        self._block_tables = np.zeros((slots, limits.blocks_per_sequence), np.int32)
        self._window_tables = np.zeros_like(self._block_tables) if limits.window_blocks else None
        self._temperature = np.zeros(slots, np.float32)
        self._top_k = np.zeros(slots, np.int32)
        self._top_p = np.zeros(slots, np.float32)
        self._min_p = np.zeros(slots, np.float32)
        self._repetition_penalty = np.zeros(slots, np.float32)
        self._frequency_penalty = np.zeros(slots, np.float32)
        self._presence_penalty = np.zeros(slots, np.float32)
        self._seeds = np.zeros(slots, np.uint64)

    def build(self, step: Step) -> StepInput:
        """The arrays of a step that the scheduler has just planned."""
        chunks = step.chunks
        for chunk in chunks:
            self._show_blocks(chunk.sequence)
        starts = np.array([chunk.start for chunk in chunks], np.int32)
        lengths = np.array([chunk.length for chunk in chunks], np.int32)
        slots = np.array([chunk.sequence.slot for chunk in chunks], np.int32)
        ends = np.cumsum(lengths, dtype=np.int32)
        # The token at index i of the step has position i + shift, one shift a chunk.
        shifts = np.repeat(starts - (ends - lengths), lengths)
        rows = list(_rows(chunks))
        adapters = np.array([chunk.sequence.adapter_slot for chunk in chunks], np.int32)
        return StepInput(
            tokens=_tokens(chunks),
            positions=np.arange(ends[-1], dtype=np.int32) + shifts,
            sequences=np.repeat(np.arange(len(chunks), dtype=np.int32), lengths),
            block_tables=self._block_tables[slots],
            rows=np.array([row.token for row in rows], np.int32),
            sampling=self._sampling(rows) if rows else None,
            logprobs=_logprobs(rows),
            copies=_copies(step.copies),
            window_tables=None if self._window_tables is None else self._window_tables[slots],
            window_copies=_copies(step.window_copies),
            pooled=_pooled(chunks),
            segments=_segments(chunks),
            adapters=np.repeat(adapters, lengths) if self._has_adapters else None,
        )

    def _show_blocks(self, sequence: Sequence) -> None:
        """Write down the blocks that are new, and the parameters of a sequence that is."""
        slot, blocks = sequence.slot, sequence.blocks
        if self._tables[slot] is not blocks:
            self._admit(sequence)
        first = self._num_shown[slot]
        if first < len(blocks):
            self._block_tables[slot, first : len(blocks)] = blocks[first:]
            self._num_shown[slot] = len(blocks)
        if self._window_tables is not None:
            # What is gone shows as block 0, which is never read there.
            shown = sequence.windows.blocks
            self._window_tables[slot, : len(shown)] = np.maximum(shown, 0)

    def _admit(self, sequence: Sequence) -> None:
        slot, params = sequence.slot, sequence.params
        self._tables[slot] = sequence.blocks
        self._num_shown[slot] = 0
        self._block_tables[slot] = 0
        self._temperature[slot] = 0 if params.is_greedy else params.temperature
        self._top_k[slot] = max(params.top_k, 0)
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._repetition_penalty[slot] = params.repetition_penalty
        self._frequency_penalty[slot] = params.frequency_penalty
        self._presence_penalty[slot] = params.presence_penalty
        self._seeds[slot] = sequence.seed

    def _sampling(self, rows: list[_Row]) -> SampleInput:
        slots = np.array([row.chunk.sequence.slot for row in rows], np.int32)
        is_sampled = np.array([row.is_sampled for row in rows], np.bool_)
        # A guess's successor is not named by a slot: the engine sees it before it goes on.
        keeps = np.array([row.is_sampled and not row.chunk.drafts for row in rows], np.bool_)
        history_starts, history_ids, history_counts = _history(rows)
        return SampleInput(
            slots=np.where(keeps, slots, np.int32(NO_SLOT)),
            temperature=np.where(is_sampled, self._temperature[slots], np.float32(0)),
            top_k=self._top_k[slots],
            top_p=self._top_p[slots],
            min_p=self._min_p[slots],
            repetition_penalty=self._repetition_penalty[slots],
            frequency_penalty=self._frequency_penalty[slots],
            presence_penalty=self._presence_penalty[slots],
            seeds=self._seeds[slots],
            positions=np.array([row.position + 1 for row in rows], np.int32),
            history_starts=history_starts,
            history_ids=history_ids,
            history_counts=history_counts,
            biases=_biases(rows),
            masks=_masks(rows),
        )


def _copies(copies: list[tuple[int, int]]) -> I32Array | None:
    return np.array(copies, np.int32) if copies else None


def _rows(chunks: list[Chunk]) -> Iterator[_Row]:
    """The rows of all chunks, in the order of the step's tokens."""
    end = 0  # of the chunk, in the step
    for chunk in chunks:
        end += chunk.length
        shift = end - chunk.start - chunk.length  # index in the step less position
        for position in range(chunk.scored_start, chunk.scored_start + chunk.num_scored):
            yield _Row(chunk, shift + position, position, 0, False)
        last = chunk.start + chunk.length - len(chunk.drafts) - 1
        for guess in range(chunk.num_sampled):
            yield _Row(chunk, shift + last + guess, last + guess, guess, True)


def _pooled(chunks: list[Chunk]) -> I32Array | None:
    """[E] the tokens whose states are wanted, as indices into the step's; None: none is."""
    if not any(chunk.sequence.pool for chunk in chunks):
        return None
    indices: list[int] = []
    end = 0
    for chunk in chunks:
        first = end + chunk.pooled_start - chunk.start
        indices += range(first, first + chunk.num_pooled)
        end += chunk.length
    return np.array(indices, np.int32)


def _segments(chunks: list[Chunk]) -> I32Array | None:
    """[T] 1 for the tokens of the second text of a pair; None: there are no pairs."""
    starts = [c.sequence.pool.second_start if c.sequence.pool else None for c in chunks]
    if all(start is None for start in starts):
        return None
    parts = [
        np.arange(c.start, c.start + c.length) >= (c.sequence.prompt_len if s is None else s)
        for c, s in zip(chunks, starts, strict=True)
    ]
    return np.concatenate(parts).astype(np.int32)


def _tokens(chunks: list[Chunk]) -> I32Array:
    """[T] token ids; one in flight is named by the slot that it was sampled into."""
    tokens: list[int] = []
    for chunk in chunks:
        num_known = chunk.length - len(chunk.drafts)
        seen = chunk.sequence.tokens[chunk.start : chunk.start + num_known]
        tokens += seen if len(seen) == num_known else [*seen, -(chunk.sequence.slot + 1)]
        tokens += chunk.drafts
    return np.array(tokens, np.int32)


def _history(rows: list[_Row]) -> tuple[I32Array, I32Array, I32Array]:
    """Starts [R + 1], ids [H] and counts [H] of the rows with penalties; others own nothing."""
    starts = np.zeros(len(rows) + 1, np.int32)
    ids: list[int] = []
    counts: list[int] = []
    for index, row in enumerate(rows):
        history = row.chunk.sequence.history
        if history is not None and row.is_sampled:
            ids += history.keys()
            counts += history.values()
        starts[index + 1] = len(ids)
    return starts, np.array(ids, np.int32), np.array(counts, np.int32)


def _biases(rows: list[_Row]) -> BiasInput | None:
    if not any(row.chunk.sequence.rules.has_biases for row in rows):
        return None
    starts = np.zeros(len(rows) + 1, np.int32)
    ids: list[int] = []
    values: list[float] = []
    for index, row in enumerate(rows):
        biases = _row_biases(row) if row.is_sampled else {}
        ids += biases.keys()
        values += biases.values()
        starts[index + 1] = len(ids)
    return BiasInput(
        starts=starts, ids=np.array(ids, np.int32), values=np.array(values, np.float32)
    )


def _row_biases(row: _Row) -> Mapping[int, float]:
    sequence = row.chunk.sequence
    output = sequence.output + list(row.chunk.drafts[: row.num_guessed])
    return sequence.rules.biases(output, row.position + 1 - sequence.prompt_len)


def _masks(rows: list[_Row]) -> MaskInput | None:
    masks = {
        row.chunk.sequence: row.chunk.sequence.rules.allowed
        for row in rows
        if row.is_sampled and row.chunk.sequence.rules.allowed is not None
    }
    if not masks:
        return None
    numbers = {sequence: number for number, sequence in enumerate(masks)}
    return MaskInput(
        rows=np.array([numbers.get(row.chunk.sequence, -1) for row in rows], np.int32),
        words=np.stack([words for words in masks.values() if words is not None]),
    )


def _logprobs(rows: list[_Row]) -> LogprobInput | None:
    """The target of a row in a prompt is the token that follows there."""
    tops = [top for row in rows if (top := _num_top(row)) is not None]
    if not tops:
        return None
    targets = [
        -1 if row.is_sampled else row.chunk.sequence.tokens[row.position + 1] for row in rows
    ]
    return LogprobInput(targets=np.array(targets, np.int32), top=max(tops))


def _num_top(row: _Row) -> int | None:
    params = row.chunk.sequence.params
    return params.logprobs if row.is_sampled else params.prompt_logprobs

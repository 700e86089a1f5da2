"""Turns a planned step into the arrays that a compiled model reads.

What stays the same from step to step (block tables, sampling parameters) is kept in arrays
with a row per slot and gathered; only what is new is written. T tokens, S sequences, R rows.
"""

import numpy as np

from tokenmill.backends.base import (
    I32Array,
    SampleInput,
    StepInput,
    StepLimits,
)
from tokenmill.engine.scheduler import Chunk, Step
from tokenmill.engine.sequence import Sequence


class StepBuilder:
    """Builds every step of one engine, in order; each StepInput owns its arrays."""

    def __init__(self, limits: StepLimits) -> None:
        slots = limits.slots
        self._block_tables = np.zeros((slots, limits.blocks_per_sequence), np.int32)
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
            self._note_new(chunk)
        starts = np.array([chunk.start for chunk in chunks], np.int32)
        lengths = np.array([chunk.length for chunk in chunks], np.int32)
        ends = np.cumsum(lengths, dtype=np.int32)
        slots = np.array([chunk.sequence.slot for chunk in chunks], np.int32)
        is_sampled = np.array([chunk.is_sampled for chunk in chunks], np.bool_)
        # The token at index i of the step has position i + shift, one shift a chunk.
        shifts = np.repeat(starts - (ends - lengths), lengths)
        return StepInput(
            tokens=_tokens(chunks),
            positions=np.arange(ends[-1], dtype=np.int32) + shifts,
            sequences=np.repeat(np.arange(len(chunks), dtype=np.int32), lengths),
            block_tables=self._block_tables[slots],
            rows=ends[is_sampled] - 1,
            sampling=self._sampling(
                step.sampled, slots[is_sampled], (starts + lengths)[is_sampled]
            ),
        )

    def _note_new(self, chunk: Chunk) -> None:
        """Write down the blocks that are new, and the parameters of a sequence that is."""
        sequence, first = chunk.sequence, chunk.first_new_block
        if first == 0:
            self._admit(sequence)
        if first < len(sequence.blocks):
            row = self._block_tables[sequence.slot]
            row[first : len(sequence.blocks)] = sequence.blocks[first:]

    def _admit(self, sequence: Sequence) -> None:
        slot, params = sequence.slot, sequence.params
        self._block_tables[slot] = 0
        self._temperature[slot] = 0 if params.is_greedy else params.temperature
        self._top_k[slot] = max(params.top_k, 0)
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._repetition_penalty[slot] = params.repetition_penalty
        self._frequency_penalty[slot] = params.frequency_penalty
        self._presence_penalty[slot] = params.presence_penalty
        self._seeds[slot] = sequence.seed

    def _sampling(
        self, sequences: list[Sequence], slots: I32Array, positions: I32Array
    ) -> SampleInput | None:
        if not sequences:
            return None
        history_starts, history_ids, history_counts = _history(sequences)
        return SampleInput(
            slots=slots,
            temperature=self._temperature[slots],
            top_k=self._top_k[slots],
            top_p=self._top_p[slots],
            min_p=self._min_p[slots],
            repetition_penalty=self._repetition_penalty[slots],
            frequency_penalty=self._frequency_penalty[slots],
            presence_penalty=self._presence_penalty[slots],
            seeds=self._seeds[slots],
            positions=positions,
            history_starts=history_starts,
            history_ids=history_ids,
            history_counts=history_counts,
        )


def _tokens(chunks: list[Chunk]) -> I32Array:
    """[T] token ids; one in flight is named by the slot that it was sampled into."""
    tokens: list[int] = []
    for sequence, start, length, _, _ in chunks:
        seen = sequence.tokens[start : start + length]
        tokens += seen if len(seen) == length else [*seen, -(sequence.slot + 1)]
    return np.array(tokens, np.int32)


def _history(sequences: list[Sequence]) -> tuple[I32Array, I32Array, I32Array]:
    """Starts [R + 1], ids [H] and counts [H] of the rows with penalties; others own nothing."""
    starts = np.zeros(len(sequences) + 1, np.int32)
    ids: list[int] = []
    counts: list[int] = []
    for row, sequence in enumerate(sequences):
        if sequence.history is not None:
            ids += sequence.history.keys()
            counts += sequence.history.values()
        starts[row + 1] = len(ids)
    return starts, np.array(ids, np.int32), np.array(counts, np.int32)

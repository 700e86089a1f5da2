"""What a backend is: it compiles a graph once, then runs steps.

The engine speaks to every backend through the dataclasses here and nothing else. A step knows
arrays, never requests. T tokens in the step, S sequences, R rows whose logits are wanted,
B blocks a sequence at most, H entries of penalty history.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tokenmill.ir.low_rank import LowRank

I32Array = npt.NDArray[np.int32]
I64Array = npt.NDArray[np.int64]
U32Array = npt.NDArray[np.uint32]
U64Array = npt.NDArray[np.uint64]
F32Array = npt.NDArray[np.float32]

BLOCK_SIZE = 16
"""Positions in one block of the KV cache."""


@dataclass(frozen=True, kw_only=True)
class SampleInput:
    """How each of the R rows is sampled; every field is an array of R unless said otherwise.

    A row whose `temperature` is 0 is greedy (lowest token id wins a tie). Filters apply in this
    order: mask, bias, repetition, frequency and presence penalties, temperature, min_p, top_k,
    top_p. The random number of a row depends on (seed, position) alone.
    """

    slots: I32Array  # native slot that receives the sampled token; -1: none
    temperature: F32Array
    top_k: I32Array  # 0: off
    top_p: F32Array  # 1: off
    min_p: F32Array  # 0: off
    repetition_penalty: F32Array  # 1: off; on tokens of prompt and output
    frequency_penalty: F32Array  # 0: off; times the count in the output
    presence_penalty: F32Array  # 0: off; on tokens of the output
    seeds: U64Array
    positions: I32Array  # position that the sampled token will take in its sequence
    history_starts: I32Array  # [R + 1]: row r owns history entries [starts[r], starts[r + 1])
    history_ids: I32Array  # [H] distinct token ids within a row
    history_counts: I32Array  # [H] times the id occurs in the output; 0: in the prompt only
    biases: "BiasInput | None" = None
    masks: "MaskInput | None" = None


@dataclass(frozen=True, kw_only=True)
class BiasInput:
    """What is added to single logits before anything else; -inf forbids a token."""

    starts: I32Array  # [R + 1]: row r owns entries [starts[r], starts[r + 1])
    ids: I32Array  # distinct token ids within a row
    values: F32Array


@dataclass(frozen=True, kw_only=True)
class MaskInput:
    """Which tokens may be sampled at all: M bit masks, each for as many rows as name it."""

    rows: I32Array  # [R] row of `words`; -1: everything is allowed
    words: U32Array  # [M, ceil(vocab_size / 32)]; bit i % 32 of word i // 32 allows id i


@dataclass(frozen=True, kw_only=True)
class LogprobInput:
    """Whose log probabilities are wanted, of every row, from the logits as the model gave them."""

    targets: I32Array  # [R] token whose log probability is wanted; -1: the one sampled
    top: int  # how many of the most likely tokens too; at most limits.logprobs


@dataclass(frozen=True, kw_only=True)
class StepInput:
    """One forward step over tokens that lie sequence after sequence, positions ascending.

    A sequence's keys and values before its first position here are already in its blocks.
    Position p of sequence s lies in block `block_tables[s, p // BLOCK_SIZE]`. Layers with a window
    may have a pool of their own, of `limits.window_blocks`; in that, the blocks of positions that
    no token of this step or a later one sees belong to others, whatever `window_tables` shows.
    """

    tokens: I32Array  # [T] token id, or -(slot + 1): the token last sampled into that slot
    positions: I32Array  # [T]
    sequences: I32Array  # [T] row of block_tables
    block_tables: I32Array  # [S, B] block ids; unused entries are 0
    rows: I32Array  # [R] ascending indices into tokens
    sampling: SampleInput | None  # None: forward only, nothing is sampled
    logprobs: LogprobInput | None = None
    copies: I32Array | None = None  # [C, 2] (from, to): blocks copied before the step
    window_tables: I32Array | None = None  # [S, B] as block_tables, if limits.window_blocks
    window_copies: I32Array | None = None  # [C, 2] as copies, in the pool of those layers
    want_logits: bool = False
    pooled: I32Array | None = None  # [E] ascending indices into tokens; see StepOutput.hidden
    segments: I32Array | None = None  # [T] which of two texts each is of; None: all of the first
    adapters: I32Array | None = None  # [T] slot of each token's adapter; -1: none; None: all none


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What a step gave: [R] sampled tokens; logits, log probabilities and states where wanted."""

    tokens: I32Array | None
    logits: F32Array | None  # [R, vocab_size]
    logprobs: "Logprobs | None" = None
    hidden: F32Array | None = None  # [E, K] what the layers made of the pooled tokens, normed


@dataclass(frozen=True, kw_only=True)
class Logprobs:
    """Log probabilities (natural) of R rows; K = LogprobInput.top."""

    targets: F32Array  # [R]
    ranks: I32Array  # [R] 1 + how many tokens are more likely than the target
    top_ids: I32Array  # [R, K], most likely first; ties by id
    top: F32Array  # [R, K]


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """The largest step that a compiled model takes."""

    tokens: int
    sequences: int
    rows: int
    blocks: int  # blocks in the KV pool
    blocks_per_sequence: int
    slots: int
    vocab_size: int
    window: int = 0  # positions that layers with a pool of their own see; 0: none has one
    window_blocks: int = 0  # blocks in that pool
    logprobs: int = 20  # most likely tokens that a step can report for a row
    has_logits: bool = True  # False: it ends in states, and nothing can be sampled
    is_encoder: bool = False  # tokens see those behind them, so that a step has whole sequences
    adapter_slots: int = 0  # adapters that a step can read; 0: the model takes none


MAX_WINDOW_DRAFTS = BLOCK_SIZE
"""Guesses that a sequence may have in one step, where layers with a window have their own pool."""


def window_blocks_for(window: int, *, num_sequences: int, step_tokens: int) -> int:
    """Blocks of that pool that are enough for so many sequences, whatever they do.

    Each holds its window, which may start and end within a block, and guesses ahead of it. To that
    come the chunks of the step in flight and of the one that is planned meanwhile.
    """
    per_sequence = -(-(window - 1) // BLOCK_SIZE) + 1 + MAX_WINDOW_DRAFTS // BLOCK_SIZE + 1
    in_steps = 2 * (-(-step_tokens // BLOCK_SIZE) + num_sequences)
    return num_sequences * per_sequence + in_steps


class CompiledModel(Protocol):
    """A graph, compiled, with its weights and its KV pool."""

    @property
    def limits(self) -> StepLimits: ...

    def warm_up(self, *, pools: bool = False) -> None:
        """Have ready what steps of all sizes need, so that none waits for it; may take seconds.

        What only steps with pooled tokens need is left for later, unless the model `pools`.
        """
        ...

    def prepare_pooling(self) -> None:
        """Have the program for steps with pooled tokens, which the first of them would wait for.

        Any thread may call this while steps run. Raises CapacityError.
        """
        ...

    def post(self, step: StepInput) -> None:
        """Start a step and return at once. At most one step is in flight."""
        ...

    def wait(self) -> StepOutput:
        """Wait for the step in flight."""
        ...

    def set_adapter(self, slot: int, changes: Mapping[str, LowRank]) -> None:
        """Put an adapter into a slot, in place of what was there; no step is in flight.

        `changes` are by the full name of the weight; those of other weights stay as they are.
        """
        ...

    def close(self) -> None:
        """End the workers and free the memory; a second call does nothing."""
        ...

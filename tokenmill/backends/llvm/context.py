"""The context: the one block of 64-bit words through which Python and a compiled step speak.

Python writes sizes and addresses; native code reads them. Field offsets are part of every
compiled object, so FIELDS belongs to its cache key.
"""

import ctypes

import numpy as np

from tokenmill.backends.llvm.emit import Function, Value

FIELDS = (
    "control",  # the workers' block: barrier and wake-up words
    "tiles",  # tile kernels: [kind][rows - 1] addresses
    "weights",  # address of each packed weight: main's, then layer after layer
    "arena",  # activations
    "keys",  # KV pool; see lower_attention.py for the layout
    "values",
    "cache_starts",  # i64 per layer: where its part of either starts
    "T",  # tokens, rows and sequences of this step
    "R",
    "S",
    "tokens",  # i32[T]
    "positions",  # i32[T]
    "sequences",  # i32[T]
    "segments",  # i32[T]
    "lengths",  # i32[S], positions that each sequence has with this step
    "token_blocks",  # i32[T], the block that each token is written to
    "block_tables",  # i32[S, table_stride]
    "window_token_blocks",  # the same two for layers with a window
    "window_tables",
    "table_stride",
    "rows",  # i32[R]
    "E",  # tokens to pool
    "pooled",  # i32[E]
    "counters",  # i64 per phase and layer, 64 bytes apart: the next item to draw
    "slots",  # i32: the token last sampled into each slot
    "vocab",  # ids that may be sampled: [0, vocab)
    "sample_scratch",  # f32[threads, sample_stride]
    "sample_stride",
    "is_sampling",  # 0: forward only
    "sampled",  # i32[R]
    "sample_slots",  # i32[R] ... and the fields of SampleInput
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seeds",
    "sample_positions",
    "history_starts",
    "history_ids",
    "history_counts",
    "bias_starts",  # i32[R + 1] ... and those of BiasInput
    "bias_ids",
    "bias_values",
    "mask_rows",  # i32[R]; -1: none
    "masks",  # u32[M, mask_words]
    "mask_words",
    "is_logprobs",  # 1: fill what follows, for each row
    "logprob_targets",  # i32[R]; -1: the token sampled
    "logprob_top",  # how many of the most likely tokens
    "target_logits",  # f32[R]
    "target_ranks",  # i32[R]
    "logit_tops",  # f32[R], the largest logit
    "logit_sums",  # f32[R], sum of exp(logit - largest)
    "top_ids",  # i32[R, logprob_top]
    "top_logits",  # f32[R, logprob_top]
    "adapters",  # i32[T], the slot of each token's adapter; -1: it has none
)
_OFFSETS = {name: 8 * index for index, name in enumerate(FIELDS)}


class Context:
    """The block as Python sees it: `context["T"] = 3`."""

    def __init__(self) -> None:
        self._words = np.zeros(len(FIELDS), np.int64)
        self._index = {name: index for index, name in enumerate(FIELDS)}

    @property
    def address(self) -> int:
        return int(self._words.ctypes.data)

    def __setitem__(self, field: str, value: int) -> None:
        self._words[self._index[field]] = ctypes.c_int64(value).value

    def point(self, field: str, array: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> None:
        """Let a field point at an array, which the caller keeps alive."""
        assert array.flags.c_contiguous
        self[field] = int(array.ctypes.data)


def load_field(f: Function, context: Value, field: str, kind: str = "i64") -> Value:
    """A field as native code reads it; pointers with kind `ptr`."""
    return f.load(kind, context.at(_OFFSETS[field]), 8)

"""From hidden states, which come in the chunks of a prompt, to its embedding. K features."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tokenmill.backends.base import BLOCK_SIZE, F32Array, StepLimits
from tokenmill.errors import CapacityError, UsageError
from tokenmill.ir.order import lane_sum
from tokenmill.sampling.pooling import PoolingParams

_LEAST_NORM = np.float32(1e-12)


@dataclass(eq=False, kw_only=True, slots=True)
class Pool:
    """The states of one sequence that are wanted, gathered in order of their positions.

    The order is that of the positions however they are cut into chunks, and so are the bits.
    """

    params: PoolingParams
    span: tuple[int, int]  # of the wanted positions
    second_start: int | None = None  # where the second text of a pair begins, if that is told
    num_planned: int = 0  # positions before this are pooled by some planned step
    _gathered: npt.NDArray[np.float64] | None = field(default=None, init=False)
    _num_gathered: int = field(default=0, init=False)

    def wanted(self, start: int, stop: int) -> tuple[int, int]:
        """Of [start, stop), the first position that is wanted and yet to come; and how many."""
        first = max(start, self.span[0], self.num_planned)
        return first, max(0, min(stop, self.span[1]) - first)

    @property
    def next_wanted(self) -> int | None:
        """The first position that is still to be computed for its state."""
        first, count = self.wanted(0, self.span[1])
        return first if count else None

    def add(self, states_EK: F32Array) -> None:
        """Take in the states of the next wanted positions."""
        if not len(states_EK):
            return
        rows = states_EK.astype(np.float64)
        if self.params.pooling == "weightedmean":
            rows *= self._num_gathered + np.arange(1, len(rows) + 1)[:, None]
        self._num_gathered += len(states_EK)
        if self._gathered is not None:
            rows = np.concatenate([self._gathered[None], rows])
        gather = np.maximum if self.params.pooling == "max" else np.add
        # Unlike a sum, an accumulation goes row by row whatever the shape.
        self._gathered = gather.accumulate(rows, axis=0)[-1]

    def pooled(self) -> F32Array:
        """[K] what the wanted states together are."""
        assert self._gathered is not None
        count = self.span[1] - self.span[0]
        shares = {"max": 1.0, "mean_sqrt_len": count**0.5, "weightedmean": count * (count + 1) / 2}
        pooled: F32Array = (self._gathered / shares.get(self.params.pooling, count)).astype("f4")
        return pooled


def shaped(vector: F32Array, params: PoolingParams) -> F32Array:
    """A vector, cut and brought to length 1 where that is asked."""
    vector = vector[: params.dimensions]
    return normalized(vector) if params.normalize else vector


def normalized(vector: F32Array) -> F32Array:
    """The vector with length 1; zeros stay zeros."""
    length = np.sqrt(lane_sum(vector * vector))
    return (vector / np.maximum(length, _LEAST_NORM)).astype(np.float32)


def cosine(a: F32Array, b: F32Array) -> float:
    """The cosine of the angle between two vectors of length 1."""
    return float(np.clip(np.dot(a.astype(np.float64), b.astype(np.float64)), -1, 1))


def sigmoid(logit: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return float(0.5 * (1 + np.tanh(0.5 * logit)))


def why_no_text(limits: StepLimits) -> str | None:
    """Why a model generates no text; None: it does."""
    if limits.has_logits:
        return None
    if limits.is_encoder:
        return "the model is an encoder, which generates no text"
    return "the model's files hold no head (lm_head.weight), so it generates no text"


def check_length(
    name: str, prompt: SequenceOf[int], limits: StepLimits, max_model_len: int
) -> None:
    """Raise UsageError or CapacityError for a prompt that could never be pooled."""
    context = min(max_model_len, limits.blocks_per_sequence * BLOCK_SIZE)
    advice = "shorten it or set truncate_prompt_tokens"
    if len(prompt) > context:
        raise UsageError(
            f"{name} has {len(prompt)} tokens, but the model takes {context}: {advice}"
        )
    if limits.is_encoder and len(prompt) > limits.tokens:
        raise CapacityError(
            f"{name} has {len(prompt)} tokens, but an encoder reads a text in one step and a step "
            f"has {limits.tokens}: {advice}, or raise max_num_batched_tokens"
        )
    if len(prompt) > limits.blocks * BLOCK_SIZE:
        raise CapacityError(
            f"{name} has {len(prompt)} tokens, but the KV cache has room for "
            f"{limits.blocks * BLOCK_SIZE}: {advice}, or raise kv_cache_memory_bytes"
        )

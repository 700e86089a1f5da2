"""What a request gives back."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from tokenmill.backends.base import F32Array

FinishReason = Literal["stop", "length", "abort"]
"""An end or stop token or a stop string; the limit of tokens; the caller went away."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """The natural logarithm of a token's probability, as the model gave it, and its rank (1: top).

    Neither temperature nor any filter, bias or penalty has a part in it.
    """

    logprob: float
    rank: int


TokenLogprobs: TypeAlias = dict[int, Logprob]
"""One position: the token that is there comes first, then the most likely ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Seconds since the request was submitted; None where it never came to that."""

    queue_s: float | None = None  # until the first step with it was planned
    first_token_s: float | None
    last_token_s: float | None = None
    total_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionOutput:
    """One of a request's `n` samples. `stop_reason` is the stop string or token id that ended it.

    `token_ids` holds every sampled token, a final end or stop token included; `text` ends before
    it, unless the request includes its stops. `logprobs` has an entry for each token, if asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason
    stop_reason: str | int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """A finished request; `text`, `token_ids` and so on are those of the first of its `outputs`.

    `prompt_logprobs`, if asked for, has an entry for each prompt token: None for the first.
    `num_cached_tokens` of the prompt were found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    outputs: list[CompletionOutput]
    pooled: F32Array | None = None  # [K] states of the last layer, if these were asked for
    num_cached_tokens: int = 0
    timings: Timings

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason

    @property
    def stop_reason(self) -> str | int | None:
        return self.outputs[0].stop_reason

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Of all samples together."""
        return sum(len(output.token_ids) for output in self.outputs)


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputDelta:
    """What is new in sample `index` since the delta before.

    The last delta of a sample carries its `finish_reason`, the last of all the whole `output`.
    `text` may lag behind `token_ids`: half a character, or what may become a stop string, waits.
    """

    index: int = 0
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    output: RequestOutput | None = None

"""What a request gives back."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]
"""An end or stop token or a stop string; the limit of tokens; the caller went away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Seconds since the request was submitted; `first_token_s` is None where there was none."""

    first_token_s: float | None
    total_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """A finished request. `stop_reason` is the stop string or stop token id that ended it.

    `token_ids` holds every sampled token, a final end or stop token included; `text` ends
    before it.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    timings: Timings

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputDelta:
    """What is new since the delta before; the last one carries `finish_reason` and the whole.

    `text` may lag behind `token_ids`: half a character, or what may become a stop string, waits.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    output: RequestOutput | None = None

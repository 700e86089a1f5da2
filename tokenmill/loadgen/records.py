"""What is asked, and what became of it."""

from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRequest:
    """A prompt to send: text, or token ids. `arrival_s` counts from the start, where a trace
    says it."""

    prompt: str | list[int]
    prompt_len: int  # tokens, as far as known here
    output_len: int  # tokens to ask for
    arrival_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestRecord:
    """A request that was sent. All times are seconds since the start of the run.

    `token_times_s` are the arrivals of the events that brought output; `ended_s` is that of the
    last event with a choice. `error` says why it failed; a request that failed has no latencies.
    """

    started_s: float
    ended_s: float
    prompt_len: int
    output_len: int = 0
    token_times_s: list[float] = field(default_factory=list)
    text: str = ""
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        first_s = self.token_times_s[0] if self.token_times_s else self.ended_s
        return first_s - self.started_s

    @property
    def e2el_s(self) -> float:
        """Time to the last one."""
        return self.ended_s - self.started_s

    @property
    def tpot_s(self) -> float:
        """Mean time of an output token after the first; 0 where there is none."""
        if self.output_len < 2:
            return 0.0
        return (self.e2el_s - self.ttft_s) / (self.output_len - 1)

    @property
    def itls_s(self) -> list[float]:
        """Time between two events with output."""
        return [after - before for before, after in pairwise(self.token_times_s)]

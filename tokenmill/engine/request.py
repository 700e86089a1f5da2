"""Sequences together with the caller who waits for them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

from tokenmill.engine.outputs import (
    CompletionOutput,
    OutputDelta,
    RequestOutput,
    Timings,
    TokenLogprobs,
)
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.text_stream import TextStream
from tokenmill.sampling.params import SamplingParams


class EngineDeadError(RuntimeError):
    """The engine's thread ended with an error, which is the cause of this one."""


Event: TypeAlias = OutputDelta | EngineDeadError
"""What a caller hears of a request; the last is a delta with `output`, or an error."""


class Delivery(NamedTuple):
    """An event, and the request that it belongs to."""

    request: "Request"
    event: Event


Sink: TypeAlias = Callable[[list[Delivery]], None]
"""Takes what is new for all requests that name it, at most once a step, in the engine's thread.

It must be quick and not raise: `queue.SimpleQueue.put` is meant, or a function that passes the
list on to an event loop.
"""


@dataclass(eq=False, kw_only=True)
class Sample:
    """One of the sequences of a request, and the text that it has become so far."""

    index: int
    sequence: Sequence
    text: TextStream

    is_closed: bool = field(default=False, init=False)  # its last delta is made
    _texts: list[str] = field(default_factory=list, init=False)
    _num_delivered: int = field(default=0, init=False)

    def decode(self) -> OutputDelta:
        """All that is new; the text may turn out to have hit a stop string.

        The tokens behind a stop string are taken back.
        """
        sequence, first = self.sequence, self._num_delivered
        token_ids = sequence.tokens[sequence.prompt_len + first :]
        text = self._push(token_ids)
        num_taken = self._num_delivered - first
        if num_taken < len(token_ids):
            del token_ids[num_taken:]
            del sequence.tokens[sequence.prompt_len + self._num_delivered :]
            del sequence.logprobs[self._num_delivered :]
        if sequence.finish_reason:
            text += self.text.finish()
        self._texts.append(text)
        return OutputDelta(
            index=self.index, text=text, token_ids=token_ids, logprobs=self._logprobs(first)
        )

    def output(self) -> CompletionOutput:
        """The whole of a finished sequence."""
        sequence = self.sequence
        assert sequence.finish_reason is not None
        return CompletionOutput(
            index=self.index,
            text="".join(self._texts),
            token_ids=sequence.output,
            logprobs=self._logprobs(0),
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )

    def _push(self, token_ids: list[int]) -> str:
        """The text of the tokens, up to a stop string; a token that ends it is not shown."""
        params = self.sequence.params
        is_ended = self.sequence.finish_reason == "stop" and not params.include_stop_str_in_output
        shown = token_ids[:-1] if is_ended else token_ids
        if not self.text.stop:
            self._num_delivered += len(token_ids)
            return self.text.push(shown)
        text = ""
        for token in shown:
            self._num_delivered += 1
            text += self.text.push([token], can_stop=self._num_delivered > params.min_tokens)
            if self.text.matched is not None:
                return text
        self._num_delivered += len(token_ids) - len(shown)
        return text

    def _logprobs(self, first: int) -> list[TokenLogprobs] | None:
        sequence = self.sequence
        return None if sequence.params.logprobs is None else sequence.logprobs[first:]


@dataclass(eq=False, kw_only=True)
class Request:
    """A prompt and the samples that are drawn for it; `sink` hears of them.

    Unless `is_streaming`, the only delta is the last one.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    samples: list[Sample]
    sink: Sink
    is_streaming: bool = False

    _submitted_s: float = field(default=0.0, init=False)
    _first_token_s: float | None = field(default=None, init=False)
    _last_token_s: float | None = field(default=None, init=False)

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """An entry for each prompt token, once all are computed; None if they are not wanted."""
        if self.params.prompt_logprobs is None:
            return None
        return self.samples[0].sequence.prompt_logprobs

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache; 0 until that is known."""
        return self.samples[0].sequence.num_cached or 0

    @property
    def first_token_s(self) -> float | None:
        """Seconds from its submission to its first token; None before that."""
        return self._first_token_s

    @property
    def is_finished(self) -> bool:
        """Are all last deltas made? Samples that end in one step are decoded one after another."""
        return all(sample.is_closed for sample in self.samples)

    def start_clock(self) -> None:
        self._submitted_s = time.perf_counter()

    def note_token(self) -> None:
        """A token arrived."""
        self._last_token_s = self._elapsed_s()
        if self._first_token_s is None:
            self._first_token_s = self._last_token_s

    def is_due(self, sample: Sample) -> bool:
        """Is there a reason to decode now what has been sampled?"""
        return bool(self.is_streaming or sample.text.stop or sample.sequence.finish_reason)

    def close(self, sample: Sample, delta: OutputDelta) -> OutputDelta:
        """The last delta of a sample, and of the request if it is the last one."""
        sample.is_closed = True
        return replace(
            delta,
            finish_reason=sample.sequence.finish_reason,
            stop_reason=sample.sequence.stop_reason,
            output=self._output() if self.is_finished else None,
        )

    def _output(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[sample.output() for sample in self.samples],
            pooled=self.samples[0].sequence.pooled,
            num_cached_tokens=self.num_cached_tokens,
            timings=self._timings(),
        )

    def _timings(self) -> Timings:
        admitted_s = self.samples[0].sequence.admitted_s
        return Timings(
            queue_s=None if admitted_s is None else admitted_s - self._submitted_s,
            first_token_s=self._first_token_s,
            last_token_s=self._last_token_s,
            total_s=self._elapsed_s(),
        )

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._submitted_s

"""A sequence together with the caller who waits for it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tokenmill.engine.outputs import OutputDelta, RequestOutput, Timings
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.text_stream import TextStream


@dataclass(eq=False, kw_only=True)
class Request:
    """`deliver` is called in the engine's thread: with deltas, the last of which has a finish
    reason (the only one unless `is_streaming`), or once with the error that ended the engine.
    It must be quick and not raise; `queue.SimpleQueue.put` is meant.
    """

    prompt: str | None
    sequence: Sequence
    text: TextStream
    deliver: Callable[[OutputDelta | Exception], None]
    is_streaming: bool = False

    _submitted_s: float = field(default=0.0, init=False)
    _first_token_s: float | None = field(default=None, init=False)
    _num_delivered: int = field(default=0, init=False)
    _texts: list[str] = field(default_factory=list, init=False)

    def start_clock(self) -> None:
        self._submitted_s = time.perf_counter()

    def note_token(self) -> None:
        """A token arrived."""
        if self._first_token_s is None:
            self._first_token_s = self._elapsed_s()

    @property
    def is_due(self) -> bool:
        """Is there a reason to decode now what has been sampled?"""
        return bool(self.is_streaming or self.text.stop or self.sequence.finish_reason)

    def decode(self) -> OutputDelta:
        """All that is new; the text may turn out to have hit a stop string."""
        sequence = self.sequence
        token_ids = sequence.tokens[sequence.prompt_len + self._num_delivered :]
        self._num_delivered += len(token_ids)
        has_end_token = sequence.finish_reason == "stop"
        text = self.text.push(token_ids[:-1] if has_end_token else token_ids)
        if sequence.finish_reason:
            text += self.text.finish()
        self._texts.append(text)
        return OutputDelta(text=text, token_ids=token_ids)

    def closed(self, delta: OutputDelta) -> OutputDelta:
        """The last delta, with the whole output."""
        output = self._output()
        return OutputDelta(
            text=delta.text,
            token_ids=delta.token_ids,
            finish_reason=output.finish_reason,
            output=output,
        )

    def _output(self) -> RequestOutput:
        sequence = self.sequence
        assert sequence.finish_reason is not None
        return RequestOutput(
            prompt=self.prompt,
            prompt_token_ids=sequence.tokens[: sequence.prompt_len],
            text="".join(self._texts),
            token_ids=sequence.output,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            timings=Timings(first_token_s=self._first_token_s, total_s=self._elapsed_s()),
        )

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._submitted_s

"""Server-sent events, and what an OpenAI stream says in them."""

import json
from dataclasses import dataclass, field
from typing import Any

DONE = b"[DONE]"
_TEXT_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")


@dataclass
class EventParser:
    """Cuts a stream of bytes into the data of events."""

    _pending: bytes = b""
    _lines: list[bytes] = field(default_factory=list)

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that are now complete."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        events = []
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._lines.append(line[5:].removeprefix(b" "))
            elif not line and self._lines:
                events.append(b"\n".join(self._lines))
                self._lines = []
        return events


@dataclass
class CompletionStream:
    """One streamed answer: what was said, and when each piece arrived.

    An event counts as output where it brings text (or token ids), not where it only names the
    role: a server that greets early gains nothing.
    """

    times_s: list[float] = field(default_factory=list)  # of events with output
    texts: list[str] = field(default_factory=list)
    last_s: float | None = None  # of the last event with a choice
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    error: str | None = None
    is_finished: bool = False

    _parser: EventParser = field(default_factory=EventParser)

    def receive(self, data: bytes, time_s: float) -> None:
        for event in self._parser.feed(data):
            if event == DONE:
                self.is_finished = True
            else:
                self._read(event, time_s)

    def _read(self, event: bytes, time_s: float) -> None:
        try:
            document: dict[str, Any] = json.loads(event)
            if "error" in document:
                self.error = f"the stream broke off: {error_message(document)}"
            if usage := document.get("usage"):
                self.num_prompt_tokens = usage["prompt_tokens"]
                self.num_output_tokens = usage.get("completion_tokens", 0)
            for choice in document.get("choices") or ():
                self._take(choice, time_s)
        except (ValueError, TypeError, KeyError, AttributeError):
            self.error = "the stream holds an event that is no completion chunk"

    def _take(self, choice: dict[str, Any], time_s: float) -> None:
        self.last_s = time_s
        if choice.get("finish_reason"):
            self.is_finished = True
        delta = choice.get("delta") or {}
        text = choice.get("text") or next((delta[f] for f in _TEXT_FIELDS if delta.get(f)), None)
        if text or choice.get("token_ids"):
            self.times_s.append(time_s)
            self.texts.append(text if isinstance(text, str) else "")


def error_message(document: dict[str, Any]) -> str:
    """What an error document says, on one short line."""
    error = document.get("error", document.get("detail", document.get("message", document)))
    message = error.get("message", error) if isinstance(error, dict) else error
    return shorten(str(message))


def shorten(text: str, limit: int = 200) -> str:
    """One line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."

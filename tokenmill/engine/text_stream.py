"""Tokens become text that a caller may see: never half a character, never part of a stop string."""

from collections.abc import Sequence
from typing import Protocol


class TextDecoder(Protocol):
    """Incremental detokenization of one sequence, as `models.detokenizer.Detokenizer` does it."""

    def push(self, ids: Sequence[int], /) -> str: ...

    def finish(self) -> str: ...


class TextStream:
    """Decodes one sequence's output and ends it before the first stop string in it, or behind it.

    Stop strings are found in text, wherever token borders lie. Text that may become the
    beginning of one is held back until the next tokens decide. Ids from `vocab_size` on have no
    text: a model may pad its vocabulary beyond the tokenizer's.
    """

    def __init__(
        self,
        decoder: TextDecoder,
        *,
        vocab_size: int,
        stop: Sequence[str] = (),
        includes_stop: bool = False,
    ) -> None:
        self.stop = tuple(stop)
        self.matched: str | None = None
        self._includes_stop = includes_stop
        self._decoder = decoder
        self._vocab_size = vocab_size
        self._held = ""

    def push(self, token_ids: Sequence[int], *, can_stop: bool = True) -> str:
        """The text that these tokens release; unless it `can_stop`, stop strings are plain text."""
        text = self._decoder.push([t for t in token_ids if t < self._vocab_size])
        return self._release(text) if can_stop else text

    def finish(self) -> str:
        """What is left once there are no more tokens."""
        text = self._release(self._decoder.finish()) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(text.index(stop), stop) for stop in self.stop if stop in text]
        if found:
            end, self.matched = min(found)
            end += len(self.matched) if self._includes_stop else 0
            self._held = ""
        else:
            end = len(text) - max((_overlap(text, stop) for stop in self.stop), default=0)
            self._held = text[end:]
        return text[:end]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

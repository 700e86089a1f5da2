"""Prompt lookup: guess that a text goes on as it did after the same few tokens before.

The idea is Saxena's (github.com/apoorvumang/prompt-lookup-decoding); it costs no model, and is
often right where an answer quotes its prompt: code, summaries, corrections.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

_SIZES = (4, 3, 2)
"""Tokens that must agree, the longest match first."""


@dataclass(slots=True)
class NgramIndex:
    """Where each short run of a text's tokens last went on."""

    _next: dict[tuple[int, ...], int] = field(default_factory=dict)
    _num_indexed: int = 0

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that may follow; none where nothing like the end came before.

        `tokens` must be those of the last call, and what followed them.
        """
        self._extend(tokens)
        for size in _SIZES:
            start = self._next.get(tuple(tokens[-size:])) if size < len(tokens) else None
            if start is not None:
                return _continued(tokens, start, count)
        return []

    def _extend(self, tokens: Sequence[int]) -> None:
        for end in range(max(1, self._num_indexed), len(tokens)):
            for size in _SIZES:
                if size <= end:
                    self._next[tuple(tokens[end - size : end])] = end
        self._num_indexed = len(tokens)


def _continued(tokens: Sequence[int], start: int, count: int) -> list[int]:
    """`count` tokens from `start` on; a text that ends too soon is thought to repeat itself."""
    guess = list(tokens[start : start + count])
    period = len(tokens) - start
    while len(guess) < count:
        guess.append(guess[-period])
    return guess

"""How boldly to guess: measured on each sequence, since it differs from text to text."""

import math
from dataclasses import dataclass

_MEMORY = 0.85
"""Weight of the past when what a step gained is averaged in."""

_HOPE = 1.0
"""Tokens that a sequence is thought to gain a step before it is known."""

_FIRST_REST = 16
_LONGEST_REST = 512
"""Tokens for which a sequence that guesses badly stops: doubled each time, up to the longest."""


@dataclass(slots=True)
class Pace:
    """Whether guessing pays for one sequence, by how many tokens it gained of late."""

    gain: float = _HOPE  # tokens gained a step, averaged
    _rest: int = _FIRST_REST
    _resumes_at: int = 0  # number of tokens from which it guesses again

    def is_on(self, num_tokens: int) -> bool:
        return num_tokens >= self._resumes_at

    @property
    def num_drafts(self) -> int:
        """A few more than have been right of late: each is a row that the step must compute."""
        return 1 + math.ceil(2 * self.gain)

    def note(self, num_accepted: int, num_tokens: int, cost: float) -> None:
        """A step gained so many tokens; guessing cost the time of `cost` tokens.

        `num_tokens` is the length of the sequence now. A step for which there was no guess
        gained nothing.
        """
        self.gain = _MEMORY * self.gain + (1 - _MEMORY) * num_accepted
        if self.gain > 2 * cost:
            self._rest = _FIRST_REST
        if self.gain < cost:
            self._resumes_at = num_tokens + self._rest
            self._rest = min(2 * self._rest, _LONGEST_REST)
            self.gain = min(_HOPE, 1.5 * cost)

"""How many tokens of prompts a step may take while other sequences wait for their next token.

A step takes as long as what is in it, and everybody in it waits for all of it. Long steps read
prompts fastest; short ones keep the gaps between tokens small. So a server states the gap that it
is ready to cause, and prompts get what the next tokens of the others leave of it.
"""

import time
from collections.abc import Callable

from tokenmill.engine.step import Step

_MEMORY = 0.8
"""Weight of the past in averages."""


class PromptBudget:
    """Keeps steps near `target_s` by what steps have taken so far.

    The time of a step is modelled as that of its next tokens, which hardly changes from one step
    to another, plus a constant for each token of a prompt. Bits do not depend on how prompts are
    cut, so a measured budget is as good as any.
    """

    def __init__(
        self, target_s: float, least: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Prompts get `least` tokens of every step, whatever that takes; `clock` gives seconds."""
        self._target_s = target_s
        self._least = least
        self._clock = clock
        self._next_s = 0.0  # of a step without prompts
        self._token_s = 0.0  # of a token of a prompt
        self._posted: tuple[Step, float] | None = None

    def tokens(self) -> int | None:
        """For the next step, if sequences go on in it; None: no limit is known yet."""
        if not self._token_s:
            return None
        return max(self._least, int((self._target_s - self._next_s) / self._token_s))

    def note_posted(self, step: Step) -> None:
        """A step of the model begins."""
        self._posted = step, self._clock()

    def note_ended(self) -> None:
        """It ended."""
        assert self._posted is not None
        step, posted_s = self._posted
        elapsed_s = self._clock() - posted_s
        num_prompt_tokens = step.num_tokens - step.num_next_tokens
        if not num_prompt_tokens:
            self._next_s = _averaged(self._next_s, elapsed_s)
            return
        next_s = self._next_s if step.num_next_tokens else 0.0
        token_s = max(0.0, elapsed_s - next_s) / num_prompt_tokens
        self._token_s = _averaged(self._token_s, token_s)


def _averaged(average: float, value: float) -> float:
    return value if average == 0 else _MEMORY * average + (1 - _MEMORY) * value

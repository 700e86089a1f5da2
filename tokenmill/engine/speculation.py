"""Guessing tokens ahead, so that one step computes several positions of a sequence.

A guess is right exactly when it is what the model samples there itself, at its own position and
with its own random number. Guesses therefore change how soon a text is done and nothing else.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from tokenmill.config import CHEAP_ROWS
from tokenmill.engine.sequence import Sequence
from tokenmill.sampling.ngrams import NgramIndex

_ROWS_COST = 0.35
"""Tokens that a step could have computed in the time that the rows of guesses take."""


class Drafter(Protocol):
    """Whoever guesses."""

    def draft(self, wanted: SequenceOf[tuple[Sequence, int]]) -> None:
        """Set the `drafts` of sequences: of each at most so many."""
        ...

    def keep_only(self, sequences: SequenceOf[Sequence]) -> None:
        """Forget all other sequences."""
        ...

    def close(self) -> None: ...


class NgramDrafter:
    """Guesses from the sequence's own text."""

    def __init__(self) -> None:
        self._indices: dict[Sequence, NgramIndex] = {}

    def draft(self, wanted: SequenceOf[tuple[Sequence, int]]) -> None:
        for sequence, count in wanted:
            index = self._indices.setdefault(sequence, NgramIndex())
            sequence.drafts = index.guess(sequence.tokens, count)

    def keep_only(self, sequences: SequenceOf[Sequence]) -> None:
        if len(self._indices) > 2 * len(sequences) + 8:
            self._indices = {s: self._indices[s] for s in sequences if s in self._indices}

    def close(self) -> None:
        self._indices.clear()


class Speculator:
    """Decides who guesses how much, and stops where it does not pay.

    It does not pay in large batches, since rows then cost time, nor for sequences whose guesses
    are mostly wrong, nor with a drafter that takes longer than it saves.
    """

    def __init__(
        self,
        drafter: Drafter,
        num_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """At most `num_tokens` guesses for each sequence; `clock` gives seconds."""
        self._drafter = drafter
        self._num_tokens = num_tokens
        self._clock = clock
        self._draft_s = 0.0
        self._step_s = 0.0
        self._posted_s = 0.0

    def decide(self, running: SequenceOf[Sequence]) -> None:
        """Set `is_speculating`. A sequence that does so must see each token before the next."""
        room = self._room(running)
        for sequence in running:
            sequence.drafts = []
            sequence.is_speculating = (
                room > 0
                and sequence.history is None
                and sequence.pool is None
                and sequence.pace.is_on(len(sequence.tokens))
            )
        self._drafter.keep_only(running)

    def propose(self, running: SequenceOf[Sequence]) -> None:
        """Set the `drafts` of the sequences that are ready for them."""
        ready = [s for s in running if s.is_speculating and s.num_pending == 1]
        if not ready:
            return
        room = self._room(running)
        started_s = self._clock()
        self._drafter.draft([(s, min(room, s.pace.num_drafts)) for s in ready])
        self._draft_s = _averaged(self._draft_s, self._clock() - started_s)
        for sequence in ready:
            sequence.draft_cost = self._cost
            if not sequence.drafts:
                sequence.pace.note(0, len(sequence.tokens), self._cost)

    def note_posted(self) -> None:
        """A step of the model begins."""
        self._posted_s = self._clock()

    def note_ended(self) -> None:
        """It ended."""
        self._step_s = _averaged(self._step_s, self._clock() - self._posted_s)

    def close(self) -> None:
        self._drafter.close()

    @property
    def _cost(self) -> float:
        """Tokens that guessing costs a step."""
        return _ROWS_COST + (self._draft_s / self._step_s if self._step_s else 0.0)

    def _room(self, running: SequenceOf[Sequence]) -> int:
        return min(self._num_tokens, CHEAP_ROWS // max(1, len(running)) - 1)


def _averaged(average: float, value: float) -> float:
    return value if average == 0 else 0.9 * average + 0.1 * value

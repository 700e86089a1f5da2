"""Sequences that follow others of their call: one is let go for each that ends.

So a call of any length keeps no more places in the queue than it was let in with, and what comes
meanwhile from others is not behind all of it.
"""

from collections.abc import Sequence as SequenceOf
from itertools import islice

from tokenmill.engine.sequence import Sequence


class Backlog:
    """Who of each call is held back, in order. Whoever shares it with other threads locks it."""

    def __init__(self) -> None:
        self._lines: dict[Sequence, dict[Sequence, None]] = {}  # of a call's sequences: its line
        self.num_held = 0

    def hold(self, sequences: SequenceOf[Sequence], at_once: int) -> list[Sequence]:
        """Hold back what is beyond `at_once`; returns the others."""
        line = dict.fromkeys(islice(sequences, at_once, None))
        if line:
            self._lines |= dict.fromkeys(sequences, line)
            self.num_held += len(line)
        return list(sequences[:at_once])

    def follow(self, ended: Sequence) -> Sequence | None:
        """Who is let go since a sequence has ended that was not held."""
        line = self._lines.pop(ended, None)
        if not line:
            return None
        following = next(iter(line))
        del line[following]
        self.num_held -= 1
        return following

    def drop(self, sequence: Sequence) -> bool:
        """Forget a sequence that is held; False where it is not."""
        if sequence not in self._lines.get(sequence, ()):
            return False
        del self._lines.pop(sequence)[sequence]
        self.num_held -= 1
        return True

"""Waiting for what another process writes, where nothing wakes a rank: look often, then sleep.

Looking is quicker by what a sleep takes at least, some 70 microseconds; but whoever looks keeps a
processor from those that have something to do, perhaps the one that is waited for. So a rank looks
as long as its waits turn out to be short, and hardly at all where they last long anyway.
"""

import time
from collections.abc import Callable, Sequence

_SLEEPS_S = (0.00002, 0.00005, 0.0002, 0.001)
_SLEEPS_EACH = 50
_LEAST_SPINS = 20
_FEW_SLEEPS = 4
"""A wait with so many was not much longer than looking for it all the time would have been."""


class Pauses:
    """The waits of one rank. `most_spins` is how often it looks before it sleeps, at most."""

    def __init__(self, most_spins: int) -> None:
        self._most_spins = self._num_spins = most_spins
        self._num_sleeps = 0
        """In the wait that is under way, or was last."""

    def wait(self, checks: Sequence[Callable[[], bool]], attempt: int) -> None:
        """Return once a check holds, or soon. The first attempt of a wait looks before it sleeps;
        later ones sleep, the longer the more there were."""
        if attempt == 0:
            self._learn()
            for _ in range(self._num_spins):
                for check in checks:
                    if check():
                        return
        self._num_sleeps += 1
        time.sleep(_SLEEPS_S[min(attempt // _SLEEPS_EACH, len(_SLEEPS_S) - 1)])

    def _learn(self) -> None:
        """From the last wait."""
        if self._num_sleeps <= _FEW_SLEEPS:
            self._num_spins = min(self._most_spins, 2 * self._num_spins)
        else:
            self._num_spins = max(_LEAST_SPINS, self._num_spins // 2)
        self._num_sleeps = 0

"""Waiting for what another process writes, where nothing wakes a rank: look often, then sleep."""

import time
from collections.abc import Callable, Sequence

_SLEEPS_S = (0.00002, 0.00005, 0.0002, 0.001)
_SLEEPS_EACH = 50


def spin_or_sleep(checks: Sequence[Callable[[], bool]], num_spins: int, attempt: int) -> None:
    """Return once a check holds, or soon. The first attempt looks `num_spins` times before it
    sleeps; later ones sleep, the longer the more there were."""
    if attempt == 0:
        for _ in range(num_spins):
            for check in checks:
                if check():
                    return
    time.sleep(_SLEEPS_S[min(attempt // _SLEEPS_EACH, len(_SLEEPS_S) - 1)])

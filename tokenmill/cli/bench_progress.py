"""How far a benchmark is: one line on standard error, now and then.

A bar that redraws itself many times a second would delay what is measured.
"""

import sys
import time
from collections.abc import Callable

TERMINAL_INTERVAL_S = 1.0
FILE_INTERVAL_S = 10.0


class BenchProgress:
    """A line that is replaced once a second on a terminal, and added every ten in a file."""

    def __init__(self) -> None:
        self._started_s = self._shown_s = time.perf_counter()
        self._is_terminal = sys.stderr.isatty()

    def show(self, line: Callable[[float], str]) -> None:
        """Make the line, from the seconds since the start, and show it if it is time to."""
        now_s = time.perf_counter()
        interval_s = TERMINAL_INTERVAL_S if self._is_terminal else FILE_INTERVAL_S
        if now_s - self._shown_s < interval_s:
            return
        self._shown_s = now_s
        start, end = ("\r\x1b[K", "") if self._is_terminal else ("", "\n")
        print(f"{start}{line(now_s - self._started_s)}", end=end, file=sys.stderr, flush=True)

    def count(self, what: str) -> Callable[[int, int], None]:
        """A function that takes how many are done, and of how many."""
        return lambda done, total: self.show(lambda _: f"{done}/{total} {what}")

    def close(self) -> None:
        """Clear the line."""
        if self._is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

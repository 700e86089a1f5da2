"""Progress on standard error: a bar on a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NoReturn

from tokenmill.models.home import format_bytes
from tokenmill.models.progress import Progress, Task

if TYPE_CHECKING:
    from tqdm import tqdm

PATIENCE_S = 0.4
"""What is done sooner than this is not mentioned, and costs no import of tqdm."""
LINE_INTERVAL_S = 5.0


def make_progress() -> Progress:
    """The progress that suits standard error."""
    return TerminalProgress() if sys.stderr.isatty() else LineProgress()


class TerminalProgress:
    """A bar that appears once the work takes long, and goes when it is done."""

    @contextmanager
    def task(self, description: str, total_bytes: int | None = None) -> Iterator[Task]:
        with ExitStack() as stack:
            yield _BarTask(stack, description, total_bytes)

    def note(self, message: str) -> None:
        print(message, file=sys.stderr)


class LineProgress:
    """A line every few seconds, and one at the end of work that took long."""

    @contextmanager
    def task(self, description: str, total_bytes: int | None = None) -> Iterator[Task]:
        task = _LineTask(description, total_bytes)
        yield task
        task.finish()

    def note(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)


class _BarTask:
    def __init__(self, stack: ExitStack, description: str, total_bytes: int | None) -> None:
        self._stack = stack
        self._description = description
        self._total_bytes = total_bytes
        self._started_s = time.monotonic()
        self._waiting_bytes = 0  # done before the bar appeared
        self._bar: tqdm[NoReturn] | None = None

    def advance(self, num_bytes: int) -> None:
        self._waiting_bytes += num_bytes
        if self._bar is None and time.monotonic() - self._started_s > PATIENCE_S:
            self._bar = self._stack.enter_context(_make_bar(self._description, self._total_bytes))
        if self._bar is not None:
            self._bar.update(self._waiting_bytes)
            self._waiting_bytes = 0


def _make_bar(description: str, total_bytes: int | None) -> "tqdm[NoReturn]":
    from tqdm import tqdm

    return tqdm(
        desc=description,
        total=total_bytes,
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        leave=False,
        dynamic_ncols=True,
    )


class _LineTask:
    def __init__(self, description: str, total_bytes: int | None) -> None:
        self._description = description
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._told_bytes: int | None = None
        self._started_s = self._told_s = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        if time.monotonic() - self._told_s > LINE_INTERVAL_S:
            self._told_s = time.monotonic()
            self._tell()

    def finish(self) -> None:
        took_long = time.monotonic() - self._started_s > PATIENCE_S
        if took_long and self._told_bytes != self._done_bytes:
            self._tell()

    def _tell(self) -> None:
        self._told_bytes = self._done_bytes
        done = format_bytes(self._done_bytes)
        total = f" of {format_bytes(self._total_bytes)}" if self._total_bytes else ""
        print(f"{self._description}: {done}{total}", file=sys.stderr, flush=True)

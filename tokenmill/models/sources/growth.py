"""Progress of a download that another program or library makes: watch its folder grow."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenmill.models.progress import Task

POLL_INTERVAL_S = 0.2


class Meter:
    """Tells a task how far the work has come in all, never backwards and never past the end."""

    def __init__(self, task: Task, total_bytes: int | None) -> None:
        self._task = task
        self._total_bytes = total_bytes
        self._told_bytes = 0

    def reach(self, num_bytes: int) -> None:
        """`num_bytes` of the whole are done."""
        if self._total_bytes is not None:
            num_bytes = min(num_bytes, self._total_bytes)
        self._task.advance(max(0, num_bytes - self._told_bytes))
        self._told_bytes = max(self._told_bytes, num_bytes)


@contextmanager
def watch_growth(folder: Path, meter: Meter, start_bytes: int) -> Iterator[None]:
    """While inside, the meter reads `start_bytes` and the growth of `folder` since."""
    before = folder_size(folder)
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(POLL_INTERVAL_S):
            meter.reach(start_bytes + folder_size(folder) - before)

    watcher = threading.Thread(target=poll, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def folder_size(folder: Path) -> int:
    """Bytes of the files below `folder`, those that vanish meanwhile left out."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            total += _size(os.path.join(parent, name))
    return total


def _size(path: str) -> int:
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:
        return 0

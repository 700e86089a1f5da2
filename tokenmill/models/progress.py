"""How long work tells the user where it is, without knowing what the user looks at."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, num_bytes: int) -> None:
        """`num_bytes` more are done; 0 says only that the work is alive."""
        ...


class Progress(Protocol):
    """Somebody to whom progress is told."""

    def task(
        self, description: str, total_bytes: int | None = None
    ) -> AbstractContextManager[Task]:
        """Announce a piece of work; `total_bytes` is None where it is not known."""
        ...

    def note(self, message: str) -> None:
        """Say one line that the user ought to know."""
        ...


class SilentProgress:
    """Tells nobody."""

    @contextmanager
    def task(self, description: str, total_bytes: int | None = None) -> Iterator[Task]:
        yield self

    def advance(self, num_bytes: int) -> None:
        return

    def note(self, message: str) -> None:
        return

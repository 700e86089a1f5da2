"""Somebody who is told of progress, and remembers."""

from tokenmill.models.progress import SilentProgress


class Notes(SilentProgress):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)

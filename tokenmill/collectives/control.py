"""How the ranks of a communicator find each other, and learn that one has failed or gone.

Beside the channels for data, every rank keeps a connection to a small server in the process of rank
0. At the start they meet there and exchange addresses. Later it is silent, until a rank gives up
(all are told why) or its connection breaks (its process has ended, however that came about).
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from tokenmill.errors import CollectiveError

LEFT = "has left"
"""It closed its communicator."""
ENDED = "has ended"
"""Its process is no more, or cannot be reached."""


@dataclass(kw_only=True)
class Notices:
    """What a rank has been told about others."""

    failure: str | None = None
    """Why another rank gave up; the first such."""
    gone: dict[int, str] = field(default_factory=dict)
    """LEFT or ENDED, by rank."""


class Control(Protocol):
    """One rank's side. All but `get` return at once."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def put(self, key: str, value: str) -> None:
        """Publish a value."""

    def get(self, key: str, timeout_s: float) -> str:
        """A value that some rank publishes. Raises CollectiveError if none does in time."""

    def notices(self) -> Notices:
        """What has come in so far."""

    def abort(self, reason: str) -> None:
        """Tell all ranks that this one gives up."""

    def close(self) -> None:
        """Tell all ranks that this one leaves."""


def put_own(control: Control, key: str, value: str) -> None:
    """Publish this rank's value under a key that all ranks have."""
    control.put(f"{key}/{control.rank}", value)


def get_all(control: Control, key: str, timeout_s: float) -> list[str]:
    """The values of all ranks, in order. Raises CollectiveError."""
    return [control.get(f"{key}/{rank}", timeout_s) for rank in range(control.size)]


def meet(control: Control, key: str, timeout_s: float) -> None:
    """Return when all ranks have come here. Raises CollectiveError."""
    put_own(control, key, "")
    get_all(control, key, timeout_s)


def late_text(key: str, timeout_s: float) -> str:
    """Why nothing was published."""
    what, _, rank = key.rpartition("/")
    return f"rank {rank} has not published its {what} within {timeout_s:g} s"


class Hub:
    """What the controls of ranks in one process share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: dict[str, str] = {}
        self.notices = [Notices() for _ in range(size)]
        self.changed = threading.Condition()

    def tell(self, change: Callable[[Notices], object], *, source: int) -> None:
        """Let all ranks but one know."""
        with self.changed:
            for rank, notices in enumerate(self.notices):
                if rank != source:
                    change(notices)
            self.changed.notify_all()


class LocalControl:
    """The control of a rank that is a thread."""

    def __init__(self, hub: Hub, rank: int) -> None:
        self._hub, self.rank, self.size = hub, rank, hub.size

    def put(self, key: str, value: str) -> None:
        with self._hub.changed:
            self._hub.values[key] = value
            self._hub.changed.notify_all()

    def get(self, key: str, timeout_s: float) -> str:
        hub, mine = self._hub, self._hub.notices[self.rank]
        with hub.changed:
            hub.changed.wait_for(lambda: key in hub.values or mine.failure, timeout_s)
            if key in hub.values:
                return hub.values[key]
        raise CollectiveError(f"rank {self.rank}: {mine.failure or late_text(key, timeout_s)}")

    def notices(self) -> Notices:
        return self._hub.notices[self.rank]

    def abort(self, reason: str) -> None:
        def change(notices: Notices) -> None:
            notices.failure = notices.failure or reason

        self._hub.tell(change, source=self.rank)

    def close(self) -> None:
        self._hub.tell(lambda notices: notices.gone.setdefault(self.rank, LEFT), source=self.rank)

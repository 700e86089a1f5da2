"""Whether the server takes requests, how many it has, and how it ends."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

_POLL_S = 0.02


class Life:
    """Serving, then draining, then ended."""

    def __init__(self) -> None:
        self.num_active = 0  # requests that have no complete answer yet
        self.num_watching = 0  # of these, live views, which nobody waits for
        self.is_draining = False
        self.ended = asyncio.Event()

    @contextmanager
    def serving(self) -> Iterator[None]:
        self.num_active += 1
        try:
            yield
        finally:
            self.num_active -= 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.num_watching += 1
        try:
            yield
        finally:
            self.num_watching -= 1

    async def drain(self, timeout_s: float) -> bool:
        """Refuse what comes and wait for what is there; True: nothing is left."""
        self.is_draining = True
        give_up_s = asyncio.get_running_loop().time() + timeout_s
        while self.num_active > self.num_watching:
            if asyncio.get_running_loop().time() > give_up_s or self.ended.is_set():
                break
            await asyncio.sleep(_POLL_S)
        self.ended.set()
        return self.num_active <= self.num_watching

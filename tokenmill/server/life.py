"""Whether the server takes requests, how many it has, and how it ends."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

_POLL_S = 0.02


class Life:
    """Serving, then draining, then ended."""

    def __init__(self) -> None:
        self.num_active = 0  # requests that are all here and have no complete answer yet
        self.num_watching = 0  # of these, live views, which nobody waits for
        self.is_draining = False
        self.ended = asyncio.Event()
        self._reading: set[asyncio.Timeout] = set()

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

    @asynccontextmanager
    async def reading(self, until_s: float) -> AsyncIterator[None]:
        """Wait for what a client sends, until then on the loop's clock or until the server ends.

        Raises TimeoutError.
        """
        async with asyncio.timeout_at(0 if self.ended.is_set() else until_s) as limit:
            self._reading.add(limit)
            try:
                yield
            finally:
                self._reading.discard(limit)

    def end(self) -> None:
        """Wait for nobody any more."""
        self.ended.set()
        for limit in self._reading:
            limit.reschedule(0)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse what comes and wait for what is there; True: nothing is left."""
        self.is_draining = True
        give_up_s = asyncio.get_running_loop().time() + timeout_s
        while self.num_active > self.num_watching:
            if asyncio.get_running_loop().time() > give_up_s or self.ended.is_set():
                break
            await asyncio.sleep(_POLL_S)
        self.end()
        return self.num_active <= self.num_watching

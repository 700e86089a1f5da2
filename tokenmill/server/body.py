"""The body of a request, within a size and a time, whatever its headers say."""

import asyncio
from collections.abc import Callable

from starlette.types import Message, Receive

from tokenmill.server.errors import ApiError, draining
from tokenmill.server.life import Life

_PATIENCE = 4
"""Times the largest body that are read, and dropped, of one that is too large."""

_DROP_S = 5.0
"""Time for which they are."""

_CLOSE = {"Connection": "close"}


class BoundedBody:
    """An ASGI `receive` that ends a body which is too large (413) or takes too long (408).

    `on_complete` is called once the body is all there; what is received after that is passed on.
    """

    def __init__(
        self,
        receive: Receive,
        *,
        life: Life,
        max_bytes: int,
        timeout_s: float,
        on_complete: Callable[[], object],
    ) -> None:
        self.is_gone = False  # the client hung up before it was complete
        self._receive = receive
        self._life = life
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._until_s = asyncio.get_running_loop().time() + timeout_s
        self._on_complete = on_complete
        self._num_bytes = 0
        self._is_complete = False

    async def __call__(self) -> Message:
        if self._is_complete:
            return await self._receive()
        message = await self._next()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_bytes:
            if message.get("more_body"):
                await self.drop()
            raise self.too_large()
        self.is_gone = message["type"] == "http.disconnect"
        if not message.get("more_body"):
            self._is_complete = True
            self._on_complete()
        return message

    async def drop(self) -> None:
        """Read on for a while: a client that still sends would not see why it is refused."""
        self._until_s = min(self._until_s, asyncio.get_running_loop().time() + _DROP_S)
        num_bytes = 0
        while num_bytes < _PATIENCE * self._max_bytes:
            try:
                message = await self._next()
            except ApiError:
                return  # the size was its first fault
            num_bytes += len(message.get("body", b""))
            if not message.get("more_body"):
                return

    def too_large(self) -> ApiError:
        text = f"the body is larger than {self._max_bytes} bytes"
        return ApiError(413, text, code="body_too_large", headers=_CLOSE)

    async def _next(self) -> Message:
        try:
            async with self._life.reading(self._until_s):
                return await self._receive()
        except TimeoutError:
            if self._life.ended.is_set():
                raise draining() from None
            text = f"the body did not arrive within {self._timeout_s:g} s"
            raise ApiError(408, text, code="body_too_slow", headers=_CLOSE) from None

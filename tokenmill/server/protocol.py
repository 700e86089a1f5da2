"""HTTP connections with limits: how many there are, and how long a peer may keep one waiting.

uvicorn bounds neither the time in which a request's head must arrive nor that in which an answer
must be read. The time for a body is the gate's (access.py), where it can be answered.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tokenmill.server.errors import RETRY_AFTER, ApiError


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How much is borne of peers."""

    max_connections: int
    head_timeout_s: float  # for a request's line and headers
    write_timeout_s: float  # in which a peer reads nothing of what waits for it


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which hangs up on peers that send no head or read no answer.

    Every byte outside a request begins the time for a head, so that none is without a limit.
    """

    patience: ClassVar[Patience]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._is_one_too_many = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    @property
    def is_busy(self) -> bool:
        """Is a request here whose answer is not written?"""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def is_owed(self) -> bool:
        """Is there a request without an answer, or an answer that is not yet on its way?"""
        return self.is_busy or self.transport.get_write_buffer_size() > 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._is_one_too_many = len(self.connections) > self.patience.max_connections
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        _cancel(self._head_timer)
        _cancel(self._write_timer)

    def data_received(self, data: bytes) -> None:
        if self._is_one_too_many:  # told so now: closing with bytes unread would lose the answer
            self.transport.write(_too_many())
            return self.transport.close()
        if self._head_timer is None and not self.is_busy:
            self._await_head()
        super().data_received(data)

    def on_headers_complete(self) -> None:
        _cancel(self._head_timer)
        self._head_timer = None
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        _cancel(self._write_timer)
        self._write_timer = self._later(self.patience.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._write_timer)

    def _await_head(self) -> None:
        self._head_timer = self._later(self.patience.head_timeout_s, self.transport.close)

    def _later(self, seconds: float, what: Callable[[], object]) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, what)


def patient_protocol(patience: Patience) -> type[PatientProtocol]:
    """The class of connections with these limits; uvicorn makes them by class alone."""
    return type("BoundedProtocol", (PatientProtocol,), {"patience": patience})


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _too_many() -> bytes:
    """An answer for which no request was read."""
    error = ApiError(503, "too many connections", code="too_many_connections", headers=RETRY_AFTER)
    response = error.response()
    head = [(b"connection", b"close"), *response.raw_headers]
    lines = [b"HTTP/1.1 503 Service Unavailable", *(b"%s: %s" % header for header in head)]
    return b"\r\n".join([*lines, b"", bytes(response.body)])

"""The least HTTP/1.1 that a load generator needs: requests out, bodies in, each with its time.

With 64 streams at 1,500 events a second, httpx took 13 % of a core and this takes 2 %: on a machine
that also runs the server, the difference would be part of every figure. A piece of a body goes
from the socket to its reader in one call, and its time is taken before anything is parsed.
"""

import asyncio
import os
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

from tokenmill.errors import UsageError
from tokenmill.loadgen.response import ExchangeError, Response

OnBody = Callable[[bytes, float], None]
"""Takes a piece of a body and when it arrived, in seconds of `time.perf_counter`."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server listens; `prefix` comes before every path ("" or "/something")."""

    host: str
    port: int
    is_tls: bool
    prefix: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_base_url(url: str) -> Address:
    """The address in `http[s]://host[:port][/prefix]`; a `/v1` at the end is left out, as
    endpoints have it. Raises UsageError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"--base-url {url!r} is no address: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--base-url is {url!r}, but must be like http://127.0.0.1:8000")
    is_tls = parts.scheme == "https"
    return Address(
        host=parts.hostname,
        port=port or (443 if is_tls else 80),
        is_tls=is_tls,
        prefix=parts.path.rstrip("/").removesuffix("/v1"),
    )


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._response: Response | None = None
        self._done: asyncio.Future[Response] | None = None
        self._on_body: OnBody | None = None
        self.is_open = False

    def exchange(self, request: bytes, on_body: OnBody) -> "asyncio.Future[Response]":
        assert self._done is None, "an exchange is under way"
        assert self._transport is not None
        self._response, self._on_body = Response(), on_body
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._done

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        response, on_body = self._response, self._on_body
        if response is None or on_body is None or self._done is None or self._done.done():
            return self.close()  # nobody asked
        try:
            for piece in response.feed(data):
                on_body(piece, now_s)
        except ExchangeError as error:
            self._fail(error)
            return self.close()
        if response.is_complete:
            self._finish(response)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._response is None or self._done is None or self._done.done():
            return
        try:
            if error is not None:
                raise ExchangeError(f"connection lost: {_os_reason(error)}")
            self._response.end()
            self._finish(self._response)
        except ExchangeError as ended:
            self._fail(ended)

    def _finish(self, response: Response) -> None:
        assert self._done
        self.is_open = self.is_open and response.keeps_alive
        done, self._done, self._response = self._done, None, None
        if not done.done():
            done.set_result(response)

    def _fail(self, error: ExchangeError) -> None:
        assert self._done
        done, self._done = self._done, None
        done.set_exception(error)


class HttpClient:
    """Sends requests to one server, over as many connections as there are requests at a time."""

    def __init__(self, address: Address, headers: Mapping[str, str], *, timeout_s: float) -> None:
        self._address = address
        self._timeout_s = timeout_s
        lines = {"Host": address.authority, "User-Agent": "tokenmill-bench", **headers}
        self._fixed_head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._idle: list[_Connection] = []
        self._tls = ssl.create_default_context() if address.is_tls else None

    async def request(
        self, method: str, path: str, body: bytes | None, on_body: OnBody
    ) -> Response:
        """Send a request; `on_body` sees the body as it comes. Raises ExchangeError."""
        message = self._message(method, path, body)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._send(message, on_body)
        except TimeoutError:
            raise ExchangeError(f"no whole answer within {self._timeout_s:g} s") from None

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _message(self, method: str, path: str, body: bytes | None) -> bytes:
        head = f"{method} {self._address.prefix}{path} HTTP/1.1\r\n{self._fixed_head}"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return f"{head}\r\n".encode("latin-1") + (body or b"")

    async def _send(self, message: bytes, on_body: OnBody) -> Response:
        while (idle := self._take_idle()) is not None:
            seen = _Seen(on_body)
            try:
                return await self._exchange(idle, message, seen)
            except ExchangeError:
                # The server may close a connection that was idle just as it is used again.
                if seen.has_data:
                    raise
        return await self._exchange(await self._connect(), message, on_body)

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> _Connection:
        address = self._address
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                _Connection, address.host, address.port, ssl=self._tls
            )
        except OSError as error:
            raise ExchangeError(f"cannot connect: {_os_reason(error)}") from error
        return connection

    async def _exchange(self, connection: _Connection, message: bytes, on_body: OnBody) -> Response:
        try:
            response = await connection.exchange(message, on_body)
        except BaseException:
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        else:
            connection.close()
        return response


@dataclass
class _Seen:
    """Passes a body on, and remembers that there was one."""

    on_body: OnBody
    has_data: bool = False

    def __call__(self, data: bytes, time_s: float) -> None:
        self.has_data = True
        self.on_body(data, time_s)


def _os_reason(error: Exception) -> str:
    """`connection refused`, whatever address it was about."""
    if isinstance(error, ssl.SSLError):
        return error.reason or "TLS failed"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    return str(error).lower() or type(error).__name__

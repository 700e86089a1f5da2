"""The control over TCP: a server in the process of rank 0, and a connection of every rank to it.

A message is its length in 4 bytes and a JSON list. From a rank: join, put, get, abort, bye. To a
rank: joined, value, failed, gone.
"""

import contextlib
import errno
import json
import os
import selectors
import socket
import struct
import threading
import time
from typing import Any, TypeAlias

from tokenmill.collectives.control import ENDED, LEFT, Notices, late_text
from tokenmill.errors import CollectiveError, UsageError

Address: TypeAlias = tuple[str, int]
_LENGTH = struct.Struct("<I")
_MOST_BYTES = 1 << 20
_GREETING = "tokenmill control 1"
_FAR_AWAY = "192.0.2.1"
"""Reserved for documents: nobody has it, so the way there is the usual way out."""
_PROBE_PORT = 9
_RETRY_S = 0.05
_GRACE_S = 2.0
"""How much longer than the server a rank waits, whose message says more."""


def parse_address(text: str) -> Address:
    """`host:port`. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 65536):
        raise UsageError(f"the address is {text!r}, but must be like 127.0.0.1:29500")
    return host.strip("[]"), int(port)


def own_address(target: str | None = None) -> str:
    """This machine's address on the way to another machine, or by default to those far away.

    127.0.0.1 if there is no such way.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target or _FAR_AWAY, _PROBE_PORT))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


class _Framing:
    """Messages from a stream of bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[list[Any]]:
        """What is complete now. Raises ValueError for what is no message of ours."""
        self._buffer += data
        found = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > _MOST_BYTES:
                raise ValueError("too long")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            message = json.loads(self._buffer[_LENGTH.size : end])
            if not (isinstance(message, list) and message):
                raise ValueError("not a list")
            found.append(message)
            del self._buffer[:end]
        return found


def _encode(message: list[Any]) -> bytes:
    data = json.dumps(message).encode()
    return _LENGTH.pack(len(data)) + data


class _Client:
    """A connection, as the server sees it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.framing = _Framing()
        self.rank: int | None = None
        self.has_left = False
        self.unsent = b""


class ControlServer:
    """Serves until all ranks are gone, in a thread of its own."""

    def __init__(self, address: Address, size: int, timeout_s: float) -> None:
        self._size, self._timeout_s = size, timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._listener = _listen(address)
        self.address: Address = self._listener.getsockname()[:2]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._clients: list[_Client] = []
        self._values: dict[str, str] = {}
        self._wanted: list[tuple[_Client, str]] = []
        self._failure: str | None = None
        self._joined: set[int] = set()
        self.left = threading.Event()
        """Rank 0 is gone, and all that it said has been passed on."""
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            while self._clients or not self._is_over():
                for key, _ in self._selector.select(timeout=0.2):
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._read(key.data)
                self._check_deadline()
        finally:
            self._listener.close()
            self._selector.close()

    def _is_over(self) -> bool:
        """All have been here, or will not come any more."""
        return len(self._joined) == self._size or time.monotonic() > self._deadline_s + _GRACE_S

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        client = _Client(connection)
        self._clients.append(client)
        self._selector.register(connection, selectors.EVENT_READ, client)

    def _read(self, client: _Client) -> None:
        try:
            data = client.connection.recv(65536)
            messages = client.framing.feed(data)
        except BlockingIOError:
            return
        except (OSError, ValueError):
            data, messages = b"", []
        for message in messages:
            try:
                self._handle(client, *message)
            except (TypeError, ValueError, AttributeError):
                data = b""  # nobody of ours speaks like this
        if not data:
            self._drop(client)

    def _handle(self, client: _Client, verb: str, *rest: Any) -> None:
        if verb == "join":
            self._join(client, *rest)
        elif client.rank is None:
            raise ValueError("must join first")
        elif verb == "put":
            self._values[str(rest[0])] = str(rest[1])
            self._answer()
        elif verb == "get":
            self._wanted.append((client, str(rest[0])))
            self._answer()
        elif verb == "abort":
            self._fail(str(rest[0]), source=client)
        elif verb == "bye":
            client.has_left = True

    def _join(self, client: _Client, greeting: str, rank: int, size: int) -> None:
        if greeting != _GREETING:
            raise ValueError("another version")
        client.rank = rank
        if size != self._size:
            self._fail(f"rank {rank} came with world size {size}, but rank 0 has {self._size}")
        elif not 0 <= rank < size:
            self._fail(f"rank {rank} came, but ranks are 0 to {size - 1}")
        elif rank in self._joined:
            self._fail(f"two processes came as rank {rank}")
        elif self._failure:
            self._send(client, ["failed", self._failure])
        else:
            self._joined.add(rank)
            if len(self._joined) == self._size:
                self._tell(["joined"])

    def _answer(self) -> None:
        ready = [entry for entry in self._wanted if entry[1] in self._values]
        self._wanted = [entry for entry in self._wanted if entry[1] not in self._values]
        for client, key in ready:
            self._send(client, ["value", key, self._values[key]])

    def _check_deadline(self) -> None:
        is_late = time.monotonic() > self._deadline_s
        if is_late and len(self._joined) < self._size and not self._failure:
            missing = [str(rank) for rank in range(self._size) if rank not in self._joined]
            one = "s" if len(missing) == 1 else ""
            ranks = f"rank{'' if one else 's'} {', '.join(missing)}"
            verb = "has" if one else "have"
            self._fail(f"{ranks} of {self._size} {verb} not come within {self._timeout_s:g} s")

    def _fail(self, reason: str, source: _Client | None = None) -> None:
        self._failure = self._failure or reason
        self._tell(["failed", reason], but=source)

    def _tell(self, message: list[Any], but: _Client | None = None) -> None:
        for client in [c for c in self._clients if c is not but and c.rank is not None]:
            self._send(client, message)

    def _send(self, client: _Client, message: list[Any]) -> None:
        """Messages are few and small: they fit into a socket's buffer, or the rank is stuck."""
        client.unsent += _encode(message)
        try:
            sent = client.connection.send(client.unsent)
            client.unsent = client.unsent[sent:]
        except OSError:
            return  # reading will tell that it is gone

    def _drop(self, client: _Client) -> None:
        if client not in self._clients:
            return
        self._clients.remove(client)
        self._wanted = [entry for entry in self._wanted if entry[0] is not client]
        self._selector.unregister(client.connection)
        client.connection.close()
        if client.rank is not None:
            self._tell(["gone", client.rank, LEFT if client.has_left else ENDED])
        if client.rank == 0:
            self.left.set()


def _listen(address: Address) -> socket.socket:
    host, port = address
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server(address, family=family, backlog=1024)
    except OSError as error:
        advice = "give another port" if error.errno == errno.EADDRINUSE else "give another address"
        reason = os.strerror(error.errno).lower() if error.errno and error.errno > 0 else str(error)
        raise CollectiveError(
            f"rank 0: cannot listen on {host}:{port}: {reason}: {advice}"
        ) from None


class TcpControl:
    """A rank's connection to the server. `server` is set in the process of rank 0."""

    def __init__(
        self,
        address: Address,
        *,
        rank: int,
        size: int,
        timeout_s: float,
        server: ControlServer | None = None,
    ) -> None:
        self.rank, self.size, self._server = rank, size, server
        self._address, self._lock, self._framing = address, threading.Lock(), _Framing()
        self._notices, self._values, self._is_joined = Notices(), dict[str, str](), False
        deadline_s = time.monotonic() + timeout_s
        self._connection = self._connect(deadline_s, timeout_s)
        self._send(["join", _GREETING, rank, size])
        try:
            self._await_joined(deadline_s + _GRACE_S)
        except BaseException:
            self._connection.close()
            raise

    @property
    def own_host(self) -> str:
        """This machine's address on the way to rank 0."""
        return str(self._connection.getsockname()[0])

    def _connect(self, deadline_s: float, timeout_s: float) -> socket.socket:
        host, port = self._address
        while True:
            try:
                connection = socket.create_connection(self._address, timeout=max(0.1, timeout_s))
                break
            except OSError as error:
                if time.monotonic() > deadline_s:
                    reason = (error.strerror or str(error)).lower()
                    raise CollectiveError(
                        f"rank {self.rank}: rank 0 does not answer at {host}:{port} within "
                        f"{timeout_s:g} s ({reason}): is it running, and is this its address?"
                    ) from None
                time.sleep(_RETRY_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _await_joined(self, deadline_s: float) -> None:
        host, port = self._address
        while not self._is_joined:
            if self._notices.failure:
                raise CollectiveError(f"rank {self.rank}: {self._notices.failure}")
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or 0 in self._notices.gone:
                what = "ended the connection" if 0 in self._notices.gone else "says nothing"
                raise CollectiveError(
                    f"rank {self.rank}: what listens at {host}:{port} {what}: is it rank 0?"
                )
            self._read(left_s)

    def _send(self, message: list[Any]) -> None:
        with contextlib.suppress(OSError):  # reading will tell that rank 0 is gone
            self._connection.settimeout(_GRACE_S)
            self._connection.sendall(_encode(message))

    def _read(self, timeout_s: float) -> None:
        """Take in what comes within a time; what is there already, if that is 0."""
        self._connection.settimeout(timeout_s)
        try:
            data = self._connection.recv(65536)
            messages = self._framing.feed(data)
        except (BlockingIOError, TimeoutError):
            return
        except (OSError, ValueError):
            data, messages = b"", []
        for message in messages:
            self._take(*message)
        if not data:
            self._notices.gone.setdefault(0, ENDED)

    def _take(self, verb: str, *rest: Any) -> None:
        if verb == "joined":
            self._is_joined = True
        elif verb == "value":
            self._values[rest[0]] = rest[1]
        elif verb == "failed":
            self._notices.failure = self._notices.failure or rest[0]
        elif verb == "gone":
            self._notices.gone.setdefault(rest[0], rest[1])

    def put(self, key: str, value: str) -> None:
        with self._lock:
            self._send(["put", key, value])

    def get(self, key: str, timeout_s: float) -> str:
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            self._send(["get", key])
            while key not in self._values:
                notices, left_s = self._notices, deadline_s - time.monotonic()
                missing = int(key.rpartition("/")[2])
                fault = notices.failure
                if fault is None and (missing in notices.gone or 0 in notices.gone):
                    gone = missing if missing in notices.gone else 0
                    fault = f"rank {gone} {notices.gone[gone]} before it published its {key}"
                if fault is None and left_s <= 0:
                    fault = late_text(key, timeout_s)
                if fault is not None:
                    raise CollectiveError(f"rank {self.rank}: {fault}")
                self._read(left_s)
            return self._values.pop(key)

    def notices(self) -> Notices:
        if self._connection.fileno() >= 0 and self._lock.acquire(blocking=False):
            try:
                if 0 not in self._notices.gone:
                    self._read(0)
            finally:
                self._lock.release()
        return self._notices

    def abort(self, reason: str) -> None:
        with self._lock:
            self._send(["abort", reason])

    def close(self) -> None:
        """Also of a control that failed. Rank 0's server goes on until all others are gone."""
        with self._lock:
            self._send(["bye"])
            self._connection.close()
        if self._server is not None:
            self._server.left.wait(_GRACE_S)  # the process may end now; the others are to know why

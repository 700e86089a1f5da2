"""Between hosts: one TCP connection for each pair of ranks, pieces with their headers in a row."""

import contextlib
import json
import select
import socket
import time
from collections.abc import Collection, Sequence

import numpy as np

from tokenmill.collectives.transports.channel import Bytes, Piece
from tokenmill.collectives.transports.wire import HEADER, HEADER_BYTES
from tokenmill.errors import CollectiveError

PIECE_BYTES = 1 << 17
_BUFFER_BYTES = 2 * (PIECE_BYTES + HEADER_BYTES)
_MOST_GREETING_BYTES = 256
_WAIT_S = 0.02


class SocketChannel:
    """A connection. Sends hold on to a payload until the kernel has taken all of it."""

    piece_bytes = PIECE_BYTES

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self.connection = connection
        self._unsent: list[memoryview] = []
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view, self._bytes = memoryview(self._buffer), np.frombuffer(self._buffer, np.uint8)
        self._start = self._end = 0
        self._taken = 0
        self._has_ended = False

    def try_send(self, header: bytes, payload: Bytes) -> bool:
        if self._unsent and not self.flush():
            return False
        self._unsent = [memoryview(header), payload.data]
        self.flush()
        return True

    def flush(self) -> bool:
        while self._unsent:
            try:
                sent = self.connection.sendmsg(self._unsent)
            except BlockingIOError:
                return False
            except OSError:
                # Whoever waits for this peer will hear that it is gone; nobody reads this any more.
                self._has_ended, self._unsent = True, []
                return True
            while self._unsent and sent >= len(self._unsent[0]):
                sent -= len(self._unsent.pop(0))
            if sent:
                self._unsent[0] = self._unsent[0][sent:]
        return True

    def poll(self) -> Piece | None:
        return self._parse() or (self._parse() if self._read() else None)

    def _parse(self) -> Piece | None:
        start, there = self._start, self._end - self._start
        if there < HEADER_BYTES:
            return None
        call, tag, message_bytes, size = HEADER.unpack_from(self._buffer, start)
        if size > PIECE_BYTES:
            raise ValueError(f"a piece of {size} bytes, not at most {PIECE_BYTES}")
        self._taken = HEADER_BYTES + size
        if there < self._taken:
            return None
        payload = self._bytes[start + HEADER_BYTES : start + self._taken]
        return Piece(call, tag, message_bytes, payload)

    def _read(self) -> bool:
        """Take in what has come; False if nothing has."""
        if self._start and self._end + PIECE_BYTES + HEADER_BYTES > _BUFFER_BYTES:
            there = self._end - self._start
            self._view[:there] = bytes(self._view[self._start : self._end])
            self._start, self._end = 0, there
        try:
            got = self.connection.recv_into(self._view[self._end :])
        except BlockingIOError:
            return False
        except OSError:
            got = 0
        self._end += got
        self._has_ended = self._has_ended or got == 0
        return got > 0

    def release(self) -> None:
        self._start += self._taken
        if self._start == self._end:
            self._start = self._end = 0

    def is_at_end(self, is_gone: bool) -> bool:
        return self._has_ended  # the connection's own end comes after all data

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
        self.connection.close()


class Listener:
    """Where the ranks of other hosts knock."""

    def __init__(self, host: str) -> None:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        self._socket = socket.create_server((host, 0), family=family, backlog=1024)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]

    def accept(
        self, job: str, peers: Collection[int], deadline_s: float
    ) -> dict[int, SocketChannel]:
        """One connection from each of these ranks; others are turned away."""
        found: dict[int, SocketChannel] = {}
        missing = set(peers)
        while missing:
            self._socket.settimeout(max(0.001, deadline_s - time.monotonic()))
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                ranks = ", ".join(map(str, sorted(missing)))
                raise CollectiveError(f"no connection came from rank {ranks}") from None
            rank = _read_greeting(connection, job, deadline_s)
            if rank not in missing:
                connection.close()
                continue
            missing.remove(rank)
            found[rank] = SocketChannel(connection)
        return found

    def close(self) -> None:
        self._socket.close()


def _read_greeting(connection: socket.socket, job: str, deadline_s: float) -> int:
    """The rank that connects; -1 for a stranger."""
    connection.settimeout(max(0.001, min(1.0, deadline_s - time.monotonic())))
    data = b""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        while not data.endswith(b"\n") and len(data) < _MOST_GREETING_BYTES:
            got = connection.recv(1)  # nothing of what follows the greeting
            if not got:
                break
            data += got
        greeting = json.loads(data)
        if greeting["job"] == job:
            return int(greeting["rank"])
    return -1


def connect(
    address: tuple[str, int], *, job: str, rank: int, peer: int, deadline_s: float
) -> SocketChannel:
    """Connect to a peer's listener. Raises CollectiveError."""
    left_s = max(0.001, deadline_s - time.monotonic())
    try:
        connection = socket.create_connection(address, timeout=left_s)
        connection.sendall(json.dumps({"job": job, "rank": rank}).encode() + b"\n")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CollectiveError(
            f"cannot connect to rank {peer} at {address[0]}:{address[1]}: {reason}"
        ) from None
    return SocketChannel(connection)


class SocketTransport:
    """Channels over connections that have been made."""

    name = "sockets"

    def __init__(self, channels: dict[int, SocketChannel]) -> None:
        self._channels = channels

    def channel(self, peer: int) -> SocketChannel:
        return self._channels[peer]

    def wait(self, incoming: Collection[int], outgoing: Collection[int], attempt: int) -> None:
        del attempt
        wait_for(
            [self._channels[peer].connection for peer in incoming],
            [self._channels[peer].connection for peer in outgoing],
            _WAIT_S,
        )

    def wait_briefly(
        self, incoming: Collection[int], outgoing: Collection[int], timeout_s: float
    ) -> None:
        """The same, for less than the millisecond that poll knows."""
        select.select(
            [self._channels[peer].connection for peer in incoming],
            [self._channels[peer].connection for peer in outgoing],
            [],
            timeout_s,
        )

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()


def wait_for(
    readers: Sequence[socket.socket], writers: Sequence[socket.socket], timeout_s: float
) -> None:
    """Sleep until one of these can be read or written."""
    poller = select.poll()
    for reader in readers:
        poller.register(reader, select.POLLIN | (select.POLLOUT if reader in writers else 0))
    for writer in writers:
        if writer not in readers:
            poller.register(writer, select.POLLOUT)
    poller.poll(timeout_s * 1e3)

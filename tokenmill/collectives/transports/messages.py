"""Over somebody else's messages: sends and receives that do not block, such as MPI's.

    piece:  | header | payload                                   |
            | the first message, _FIRST bytes | the second, if any |

The first message has one size always, and says how large the second is. So each receive knows how
much will come, which not every library forgives, and a small piece is one message. Two buffers a
direction: one is on its way while the other is filled or read.

A channel that is closed says so with a piece without payload of no call. That ends the receive
which its peer has posted, so that none is left behind in a library which cannot take it back.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import numpy as np

from tokenmill.collectives.transports.channel import Bytes, Piece
from tokenmill.collectives.transports.wire import HEADER, HEADER_BYTES

PIECE_BYTES = 1 << 18
_FIRST = 4096
_NUM_BUFFERS = 2
_GOODBYE = HEADER.pack(bytes(28), 0, 0, 0)
_GRACE_S = 2.0
"""How long at most a rank that leaves waits for the goodbyes of others."""
_LAST_PIECES_S = 0.1
"""How long pieces of a peer may come after the news of its end."""


class PeerLostError(Exception):
    """The library says that a message will never go or come."""


class Pending(Protocol):
    """A message under way; its buffer must be left alone."""

    def is_done(self) -> bool:
        """Raises PeerLostError."""


class Link(Protocol):
    """Messages to and from one peer, in order. Neither waits for anything."""

    def isend(self, message: Bytes) -> Pending: ...

    def irecv(self, message: Bytes) -> Pending:
        """The peer sends exactly as many bytes."""

    def close(self) -> None:
        """Nothing is to be sent or received any more; what is under way may be dropped."""


Check = Callable[[], bool]
WaitFor = Callable[[Sequence[Check], int], None]
"""Wait a little until a check holds; with it, how often one has waited in vain."""


def _new_buffer() -> Bytes:
    return np.empty(HEADER_BYTES + PIECE_BYTES, np.uint8)


class _Outgoing:
    """A buffer to send from, and its messages that are under way."""

    def __init__(self) -> None:
        self.bytes = _new_buffer()
        self.pending: list[Pending] = []

    def is_free(self) -> bool:
        while self.pending and self.pending[-1].is_done():
            self.pending.pop()
        return not self.pending


class MessageChannel:
    """Pieces as one or two messages each."""

    piece_bytes = PIECE_BYTES

    def __init__(self, link: Link) -> None:
        self._link = link
        self._free: deque[_Outgoing] = deque()
        self._under_way: deque[_Outgoing] = deque()
        self._num_outgoing = 0
        self._has_sent_some = False
        """Since the engine last asked."""
        self._buffer, self._next_buffer = _new_buffer(), _new_buffer()
        """The one that is being received into, and the one after it."""
        self._pending: Pending | None = None
        self._has_first = False
        self._piece: Piece | None = None
        self._cannot_send = self._cannot_receive = self._has_left = False
        self._gone_s: float | None = None
        """When others told that the peer is gone."""

    # -- sending

    def try_send(self, header: bytes, payload: Bytes) -> bool:
        self._reap()
        self._has_sent_some = False
        if not self._free and self._num_outgoing == _NUM_BUFFERS:
            return False
        if not self._free:
            self._num_outgoing += 1
            self._free.append(_Outgoing())
        outgoing = self._free.popleft()
        size = HEADER_BYTES + payload.size
        outgoing.bytes[:HEADER_BYTES] = np.frombuffer(header, np.uint8)
        outgoing.bytes[HEADER_BYTES:size] = payload
        self._under_way.append(outgoing)
        try:
            outgoing.pending.append(self._link.isend(outgoing.bytes[:_FIRST]))
            if size > _FIRST:
                outgoing.pending.append(self._link.isend(outgoing.bytes[_FIRST:size]))
        except PeerLostError:
            self._cannot_send = True
        return True

    def flush(self) -> bool:
        """True when all has gone; also when the peer has, as whoever waits for it will hear."""
        self._reap()
        self._has_sent_some = False
        return not self._under_way or self._cannot_send

    def has_sent_some(self) -> bool:
        """A piece has gone since the last `try_send` or `flush`."""
        self._reap()
        return self._has_sent_some or self._cannot_send

    def _reap(self) -> None:
        try:
            while self._under_way and self._under_way[0].is_free():
                self._free.append(self._under_way.popleft())
                self._has_sent_some = True
        except PeerLostError:
            self._cannot_send = True

    # -- receiving

    def poll(self) -> Piece | None:
        """Raises ValueError for what no peer of ours sends."""
        if self._piece is None and not (self._cannot_receive or self._has_left):
            try:
                self._piece = self._receive()
            except PeerLostError:
                self._cannot_receive = True
        return self._piece

    def _receive(self) -> Piece | None:
        self._listen()
        assert self._pending is not None
        if not self._pending.is_done():
            return None
        call, tag, message_bytes, size = HEADER.unpack_from(self._buffer.data)
        if size > PIECE_BYTES:
            raise ValueError(f"a piece of {size} bytes, not at most {PIECE_BYTES}")
        if size == 0:
            self._has_left, self._pending = True, None
            return None
        stop = HEADER_BYTES + size
        if stop > _FIRST and not self._has_first:
            self._has_first = True
            self._pending = self._link.irecv(self._buffer[_FIRST:stop])
            if not self._pending.is_done():
                return None
        payload = self._buffer[HEADER_BYTES:stop]
        self._buffer, self._next_buffer = self._next_buffer, self._buffer
        self._pending, self._has_first = None, False
        try:
            self._listen()  # the next may come while this one is being read
        except PeerLostError:
            self._cannot_receive = True
        return Piece(call, tag, message_bytes, payload)

    def _listen(self) -> None:
        """Be ready for the next piece. Raises PeerLostError."""
        if self._pending is None:
            self._pending = self._link.irecv(self._buffer[:_FIRST])

    def can_receive(self) -> bool:
        try:
            return self.poll() is not None or self._cannot_receive or self._has_left
        except ValueError:
            return True  # the engine polls, and says so

    def release(self) -> None:
        self._piece = None

    def is_at_end(self, is_gone: bool) -> bool:
        now_s = time.monotonic()
        if is_gone and self._gone_s is None:
            self._gone_s = now_s
        if self._cannot_receive or self._has_left:
            return self._piece is None
        is_late = self._gone_s is not None and now_s - self._gone_s > _LAST_PIECES_S
        return is_late and not self.can_receive()

    # -- the end

    def say_goodbye(self) -> None:
        if not self._cannot_send:
            self.try_send(_GOODBYE, np.empty(0, np.uint8))

    def has_parted(self) -> bool:
        """The peer's goodbye has come and this rank's has gone, or the peer is gone."""
        try:
            while self.poll() is not None:
                self.release()  # of a call that failed
        except ValueError:
            return True
        is_lost = self._cannot_receive or self._gone_s is not None
        return is_lost or (self._has_left and self.flush())

    def close(self) -> None:
        self._link.close()


class MessageTransport:
    """Channels over links, and a way to wait for these."""

    def __init__(self, name: str, links: Mapping[int, Link], wait_for: WaitFor) -> None:
        self.name, self._wait_for = name, wait_for
        self._channels = {peer: MessageChannel(link) for peer, link in links.items()}

    def channel(self, peer: int) -> MessageChannel:
        return self._channels[peer]

    def wait(self, incoming: Collection[int], outgoing: Collection[int], attempt: int) -> None:
        checks: list[Check] = [self._channels[peer].can_receive for peer in incoming]
        checks += [self._channels[peer].has_sent_some for peer in outgoing]
        self._wait_for(checks, attempt)

    def close(self) -> None:
        channels, attempt = list(self._channels.values()), 0
        deadline_s = time.monotonic() + _GRACE_S

        def has_parted() -> bool:
            return all(channel.has_parted() for channel in channels)

        for channel in channels:
            channel.say_goodbye()
        while not has_parted() and time.monotonic() < deadline_s:
            self._wait_for([has_parted], attempt)
            attempt += 1
        for channel in channels:
            channel.close()

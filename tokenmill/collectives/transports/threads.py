"""Between ranks that are threads of one process: queues of copied pieces."""

import threading
from collections import deque
from collections.abc import Collection

from tokenmill.collectives.transports.channel import Bytes, Piece
from tokenmill.collectives.transports.wire import HEADER

_PAUSE_S = 0.005


class ThreadHub:
    """What the transports of all ranks share. `depth` pieces fit between two ranks."""

    def __init__(self, size: int, *, piece_bytes: int = 1 << 16, depth: int = 2) -> None:
        self.size, self.piece_bytes, self.depth = size, piece_bytes, depth
        self.changed = [threading.Condition() for _ in range(size)]
        self.queues: dict[tuple[int, int], deque[Piece]] = {
            (source, target): deque() for source in range(size) for target in range(size)
        }

    def wake(self, rank: int) -> None:
        with self.changed[rank]:
            self.changed[rank].notify_all()


class _ThreadChannel:
    def __init__(self, hub: ThreadHub, rank: int, peer: int) -> None:
        self._hub, self._peer = hub, peer
        self._out, self._in = hub.queues[rank, peer], hub.queues[peer, rank]
        self.piece_bytes = hub.piece_bytes

    def try_send(self, header: bytes, payload: Bytes) -> bool:
        if len(self._out) >= self._hub.depth:
            return False
        call, tag, message_bytes, _ = HEADER.unpack(header)
        self._out.append(Piece(call, tag, message_bytes, payload.copy()))
        self._hub.wake(self._peer)
        return True

    def flush(self) -> bool:
        return True

    def poll(self) -> Piece | None:
        return self._in[0] if self._in else None

    def release(self) -> None:
        self._in.popleft()
        self._hub.wake(self._peer)

    def is_at_end(self, is_gone: bool) -> bool:
        return is_gone and not self._in


class ThreadTransport:
    """The transport of one rank."""

    name = "threads"

    def __init__(self, hub: ThreadHub, rank: int) -> None:
        self._hub, self._rank = hub, rank
        self._channels = {
            peer: _ThreadChannel(hub, rank, peer) for peer in range(hub.size) if peer != rank
        }

    def channel(self, peer: int) -> _ThreadChannel:
        return self._channels[peer]

    def wait(self, incoming: Collection[int], outgoing: Collection[int], attempt: int) -> None:
        hub, changed = self._hub, self._hub.changed[self._rank]

        def is_ready() -> bool:
            return any(hub.queues[peer, self._rank] for peer in incoming) or any(
                len(hub.queues[self._rank, peer]) < hub.depth for peer in outgoing
            )

        with changed:
            changed.wait_for(is_ready, _PAUSE_S)

    def close(self) -> None:
        """Nothing to give back."""

"""What a transport is: a channel to each peer, which carries pieces of messages.

A message is cut into pieces, so that a receiver reduces one while the next is on its way, and so
that bounded buffers suffice. Every piece says which call it belongs to (`wire.py`), and all pieces
to one peer arrive in the order in which they were sent. Channels never block: they take or give a
piece or say that they cannot now; `Transport.wait` is where a rank waits.
"""

from collections.abc import Collection
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]


class Piece(NamedTuple):
    """Part of a message, as it came."""

    call: bytes
    tag: int
    message_bytes: int
    payload: NDArray[Any]
    """uint8; valid until the channel's `release`."""


class Channel(Protocol):
    """Pieces to and from one peer."""

    @property
    def piece_bytes(self) -> int:
        """The most bytes of a piece; a multiple of 64."""

    def try_send(self, header: bytes, payload: Bytes) -> bool:
        """Take a piece, or return False where there is no room now.

        The payload must stay as it is until `flush` returns True.
        """

    def flush(self) -> bool:
        """Move on what was taken; True if nothing that was taken is needed any more."""

    def poll(self) -> Piece | None:
        """The next piece, if there is one. It stays the next until `release`."""

    def release(self) -> None:
        """The piece that `poll` gave is done with."""

    def is_at_end(self, is_gone: bool) -> bool:
        """Nothing more will come. `is_gone`: so the peer's end has been told by others."""


class Transport(Protocol):
    """Channels to all peers, and the waiting for them."""

    @property
    def name(self) -> str: ...

    def channel(self, peer: int) -> Channel: ...

    def wait(self, incoming: Collection[int], outgoing: Collection[int], attempt: int) -> None:
        """Pause until something may have come from `incoming` or gone to `outgoing`, but not long:
        at most some milliseconds. `attempt` counts the pauses since something happened."""

    def close(self) -> None: ...

"""Between processes of a host: rings of slots in shared memory.

    segment of rank r:  | channel from peer a | channel from peer b | ...
    channel:            | consumed, 64 bytes | slot 0 | slot 1 | ...
    slot:               | stamp, header, 64 bytes | payload |

Piece n of a channel goes into slot n mod SLOTS. The sender writes header and payload, and then the
stamp n + 1; the receiver, having read them, writes n + 1 into `consumed`. Each word has one writer,
and a slot is written again only when it has been consumed, so neither locks nor atomic operations
are needed, as long as a processor's stores are seen in order. x86 promises that; on others this
transport is not offered (`is_supported`).

A segment is a file in /dev/shm with a name that nobody else has. Its name is removed as soon as all
peers have mapped it, so that nothing is left behind however a rank ends. For the moment before,
its creator holds a lock on it, which the kernel releases when the creator dies: who starts next
removes files that nobody holds (`sweep`).
"""

import contextlib
import fcntl
import mmap
import os
import platform
import struct
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tokenmill.collectives.transports.channel import Bytes, Piece
from tokenmill.collectives.transports.pause import Pauses
from tokenmill.collectives.transports.wire import HEADER, HEADER_BYTES
from tokenmill.errors import CollectiveError

SLOTS = 16
"""So many that a slot has left the reader's own cache before it is written again: taking lines from
another core's cache is slower than the copying itself."""
_LINE = 64
_MOST_SLOT_BYTES = 1 << 18
_LEAST_SLOT_BYTES = 1 << 12
_SEGMENT_BYTES = 4 << 20
"""What a segment should not exceed: a container often has 64 MiB of /dev/shm."""
_STAMP = struct.Struct("<Q")
_PREFIX = "tokenmill-"
_SPIN = 1500
"""Polls before sleeping; they take some 300 microseconds."""


def is_supported() -> bool:
    """Linux, on a processor whose stores are seen in order."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "i686")


def segment_name(job: str, rank: int) -> str:
    """The file's name; `job` is random."""
    return f"{_PREFIX}{job}-{rank}"


def slot_bytes(num_peers: int) -> int:
    """Bytes of payload in a slot, so that a segment stays small. A multiple of 64."""
    fair = _SEGMENT_BYTES // max(1, num_peers * SLOTS)
    return min(_MOST_SLOT_BYTES, max(_LEAST_SLOT_BYTES, fair // _LINE * _LINE))


def sweep(folder: Path) -> None:
    """Remove segments whose creators have died before all peers had mapped them."""
    for path in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(handle)


class Segment:
    """A mapped file. The creator's holds the lock."""

    def __init__(self, path: Path, size_bytes: int, *, is_creator: bool) -> None:
        self.path, self._handle = path, -1
        try:
            if is_creator:
                self._create(size_bytes)
            else:
                self._handle = os.open(path, os.O_RDWR)
                if os.fstat(self._handle).st_size != size_bytes:
                    raise CollectiveError(f"{path} has another size than expected")
            self.memory = mmap.mmap(self._handle, size_bytes)
        except BaseException:
            if is_creator:
                self.unlink()
            self.close()
            raise

    def _create(self, size_bytes: int) -> None:
        while True:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(self._handle, fcntl.LOCK_EX)
            with contextlib.suppress(OSError):
                if os.stat(self.path).st_ino == os.fstat(self._handle).st_ino:
                    break
            os.close(self._handle)  # swept between creation and lock
        try:
            os.posix_fallocate(self._handle, 0, size_bytes)
        except OSError as error:
            raise CollectiveError(
                f"no {size_bytes >> 10} KiB of shared memory in {self.path.parent} "
                f"({error.strerror}): enlarge it, or give ranks different host ids"
            ) from None

    def unlink(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def close(self) -> None:
        """Memory goes with the last view of it."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class _Ring:
    """One direction between two ranks, in somebody's segment."""

    def __init__(self, memory: mmap.mmap, offset: int, payload_bytes: int) -> None:
        self.memory = memory
        whole = memoryview(memory)
        self.words = whole.cast("Q")
        self.consumed_at = offset // 8
        starts = [offset + _LINE + i * (_LINE + payload_bytes) for i in range(SLOTS)]
        self.stamp_at = [start // 8 for start in starts]
        self.header_at = [start + _STAMP.size for start in starts]
        self.payloads = [
            np.frombuffer(memory, np.uint8, payload_bytes, start + _LINE) for start in starts
        ]


def ring_bytes(payload_bytes: int) -> int:
    return _LINE + SLOTS * (_LINE + payload_bytes)


class SharedMemoryChannel:
    """The ring to a peer and the ring from it."""

    def __init__(self, outgoing: _Ring, incoming: _Ring, payload_bytes: int) -> None:
        self.piece_bytes = payload_bytes
        self._out, self._in = outgoing, incoming
        self._num_sent = self._num_consumed = 0
        self._num_received = 0

    def can_send(self) -> bool:
        if self._num_sent - self._num_consumed < SLOTS:
            return True
        self._num_consumed = self._out.words[self._out.consumed_at]
        return self._num_sent - self._num_consumed < SLOTS

    def can_receive(self) -> bool:
        ring, number = self._in, self._num_received
        return ring.words[ring.stamp_at[number % SLOTS]] == number + 1

    def try_send(self, header: bytes, payload: Bytes) -> bool:
        if not self.can_send():
            return False
        ring, number = self._out, self._num_sent
        slot, start = number % SLOTS, ring.header_at[number % SLOTS]
        ring.memory[start : start + HEADER_BYTES] = header
        ring.payloads[slot][: payload.size] = payload
        ring.words[ring.stamp_at[slot]] = self._num_sent = number + 1
        return True

    def flush(self) -> bool:
        return True

    def poll(self) -> Piece | None:
        ring, number = self._in, self._num_received
        slot = number % SLOTS
        if ring.words[ring.stamp_at[slot]] != number + 1:
            return None
        call, tag, message_bytes, size = HEADER.unpack_from(ring.memory, ring.header_at[slot])
        return Piece(call, tag, message_bytes, ring.payloads[slot][:size])

    def release(self) -> None:
        self._num_received += 1
        self._in.words[self._in.consumed_at] = self._num_received

    def is_at_end(self, is_gone: bool) -> bool:
        return is_gone and not self.can_receive()


class SharedMemoryTransport:
    """Channels to the ranks of the same host. Made in two steps, between which all ranks meet."""

    name = "shared memory"

    def __init__(self, *, job: str, rank: int, local_ranks: Collection[int], folder: Path) -> None:
        """Create this rank's segment. Raises CollectiveError."""
        self._job, self._rank, self._folder = job, rank, folder
        self._peers = sorted(set(local_ranks) - {rank})
        self._payload_bytes = slot_bytes(len(self._peers))
        self._size_bytes = len(self._peers) * ring_bytes(self._payload_bytes)
        self._channels: dict[int, SharedMemoryChannel] = {}
        is_crowded = len(self._peers) >= (os.cpu_count() or 1)
        self._pauses = Pauses(_SPIN // 10 if is_crowded else _SPIN)
        sweep(folder)
        self._own = self._open(rank, is_creator=True)
        self._others: Mapping[int, Segment] = {}

    def _open(self, rank: int, *, is_creator: bool = False) -> Segment:
        path = self._folder / segment_name(self._job, rank)
        try:
            return Segment(path, self._size_bytes, is_creator=is_creator)
        except OSError as error:
            raise CollectiveError(
                f"cannot open the shared memory of rank {rank}, {path} ({error.strerror}): ranks "
                "that do not share it need different host ids"
            ) from None

    def connect(self) -> None:
        """Map the segments of all peers, which exist now. Raises CollectiveError."""
        self._others = {peer: self._open(peer) for peer in self._peers}
        for index, peer in enumerate(self._peers):
            ranks = sorted({*self._peers, self._rank} - {peer})
            outgoing = self._ring(self._others[peer], ranks.index(self._rank))
            incoming = self._ring(self._own, index)
            self._channels[peer] = SharedMemoryChannel(outgoing, incoming, self._payload_bytes)

    def _ring(self, segment: Segment, index: int) -> _Ring:
        offset = index * ring_bytes(self._payload_bytes)
        return _Ring(segment.memory, offset, self._payload_bytes)

    def remove_names(self) -> None:
        """All peers have mapped this segment, or have given up: no name is needed any more."""
        self._own.unlink()
        for segment in (self._own, *self._others.values()):
            segment.close()

    def channel(self, peer: int) -> SharedMemoryChannel:
        return self._channels[peer]

    def wait(self, incoming: Collection[int], outgoing: Collection[int], attempt: int) -> None:
        receivers = [self._channels[peer].can_receive for peer in incoming]
        checks: list[Any] = receivers + [self._channels[peer].can_send for peer in outgoing]
        self._pauses.wait(checks, attempt)

    def is_ready(self, incoming: Collection[int], outgoing: Collection[int]) -> bool:
        return any(self._channels[peer].can_receive() for peer in incoming) or any(
            self._channels[peer].can_send() for peer in outgoing
        )

    def close(self) -> None:
        self.remove_names()
        self._channels.clear()

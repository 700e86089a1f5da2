"""What stands before each piece: which call of which operation it belongs to, which message, size.

A call is 28 bytes, the same on all ranks that do the same. So one comparison tells a receiver
whether its peer does what it does, and where not, the bytes say what the peer does instead.
"""

import struct
import zlib
from dataclasses import dataclass

from tokenmill.collectives.arithmetic import DATA_TYPES, REDUCTIONS
from tokenmill.collectives.task import OPS

_CALL = struct.Struct("<QBBBBIQI")
HEADER = struct.Struct(f"<{_CALL.size}sIQI4x")
"""Call, tag, bytes of the message, bytes of this piece; a multiple of 8 in all."""
HEADER_BYTES = HEADER.size

_NO_REDUCTION = 255
_DTYPE_NAMES = tuple(t.name for t in DATA_TYPES)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One use of an operation, as ranks compare it.

    `number` counts the collective calls of a communicator, and messages of send/recv with one tag
    between two ranks. `root` is the tag for send/recv. `digest` stands for the plan and for uneven
    sizes.
    """

    number: int
    op: str
    dtype: str
    reduction: str | None
    root: int
    count: int
    digest: int

    @property
    def is_message(self) -> bool:
        """A send/recv, which two ranks do by themselves."""
        return self.op == "send_recv"

    def __str__(self) -> str:
        if self.op == "barrier":
            return f"barrier (call {self.number})"
        by = f" by {self.reduction}" if self.reduction else ""
        rooted = f", root {self.root}" if self.op in ("reduce", "broadcast") else ""
        if self.is_message:
            return f"send/recv of {self.count} {self.dtype} (tag {self.root})"
        return f"{self.op} of {self.count} {self.dtype}{by}{rooted} (call {self.number})"

    def pack(self) -> bytes:
        reduction = _NO_REDUCTION if self.reduction is None else REDUCTIONS.index(self.reduction)
        return _CALL.pack(
            self.number,
            OPS.index(self.op),
            _DTYPE_NAMES.index(self.dtype),
            reduction,
            0,
            self.root,
            self.count,
            self.digest,
        )


def unpack_call(packed: bytes) -> Call:
    """What a peer sent as its call; raises ValueError for what no peer of ours sends."""
    number, op, dtype, reduction, _, root, count, digest = _CALL.unpack(packed)
    if op >= len(OPS) or dtype >= len(DATA_TYPES):
        raise ValueError("no call of ours")
    return Call(
        number=number,
        op=OPS[op],
        dtype=_DTYPE_NAMES[dtype],
        reduction=None if reduction == _NO_REDUCTION else REDUCTIONS[reduction],
        root=root,
        count=count,
        digest=digest,
    )


def call_number(packed: bytes) -> int:
    return int.from_bytes(packed[:8], "little")


def is_message(packed: bytes) -> bool:
    """Whether the call is a send/recv."""
    return packed[8] == _SEND_RECV


_SEND_RECV = OPS.index("send_recv")


def digest_of(*parts: object) -> int:
    """32 bits that differ where parts do, most likely."""
    return zlib.crc32(repr(parts).encode())

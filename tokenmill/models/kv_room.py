"""How the memory for keys and values is shared among the kinds of layers."""

from typing import NamedTuple

from tokenmill.backends.base import BLOCK_SIZE, window_blocks_for
from tokenmill.backends.llvm.lower import Program
from tokenmill.backends.llvm.model import kv_block_bytes
from tokenmill.config import EngineConfig
from tokenmill.errors import CapacityError
from tokenmill.models.home import format_bytes


class Shares(NamedTuple):
    """Blocks of layers without a window and with one, and sequences that these are enough for."""

    sequences: int
    blocks: int
    window_blocks: int


def share_room(
    program: Program, room: int, options: EngineConfig, *, blocks: int, window: int
) -> Shares:
    """Share `room` bytes; a sequence has `blocks` at most, and `window` is 0 where none is used.

    Layers with a window come first, since they need no more than their windows, but get half of the
    room at most if there are others: fewer sequences run then. Raises CapacityError where a
    single block, or a single window, does not fit.
    """
    full_bytes, window_bytes = kv_block_bytes(program)
    sequences, window_blocks = options.max_num_seqs, 0
    if window:
        most = (room // 2 if full_bytes else room) // window_bytes
        sequences, window_blocks = _windows(options, window, most)
        if window_blocks > most:
            raise _no_room(window_blocks * window_bytes, f"a window of {window} tokens", room)
    else:
        full_bytes, window_bytes = full_bytes + window_bytes, 0
    wanted = blocks * sequences
    if full_bytes:
        wanted = min(wanted, (room - window_blocks * window_bytes) // full_bytes)
    if wanted < 1:
        raise _no_room(full_bytes, f"a block of {BLOCK_SIZE} tokens of KV cache", room)
    return Shares(sequences, wanted, window_blocks)


def _windows(options: EngineConfig, window: int, most: int) -> tuple[int, int]:
    """As many sequences as `most` blocks are enough for, at least one, and their blocks."""
    for sequences in range(options.max_num_seqs, 0, -1):
        needed = window_blocks_for(
            window, num_sequences=sequences, step_tokens=options.max_num_batched_tokens
        )
        if needed <= most:
            break
    return sequences, needed


def _no_room(size_bytes: int, what: str, room: int) -> CapacityError:
    return CapacityError(
        f"{what} takes {format_bytes(size_bytes)}, and {format_bytes(room)} are there for it: "
        "raise kv_cache_memory_bytes, or choose a smaller model"
    )

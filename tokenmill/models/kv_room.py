"""How the memory for keys and values is shared among the kinds of layers."""

from collections.abc import Callable
from typing import NamedTuple

from tokenmill.errors import CapacityError
from tokenmill.models.home import format_bytes


class Shares(NamedTuple):
    """Blocks of layers without a window and with one, and sequences that these are enough for."""

    sequences: int
    blocks: int
    window_blocks: int


def share_room(
    room: int,
    block_bytes: tuple[int, int],
    *,
    block_size: int,
    blocks: int,
    sequences: int,
    windows: Callable[[int], int] | None,
) -> Shares:
    """Share `room` bytes among `sequences` of `blocks` each, or as many as there is room for.

    `block_bytes` are those of a block of `block_size` positions in all layers without a window, and
    in all with one; `windows` gives the blocks of the latter that so many sequences need, None if
    they are treated as the others. They come first, since they need no more than their windows,
    but get half of the room at most if there are others: fewer sequences run then. Raises
    CapacityError where not a single block, or not a single window, fits.
    """
    full_bytes, window_bytes = block_bytes
    window_blocks = 0
    if windows is None:
        full_bytes, window_bytes = full_bytes + window_bytes, 0
    else:
        most = (room // 2 if full_bytes else room) // window_bytes
        while sequences > 1 and windows(sequences) > most:
            sequences -= 1
        window_blocks = windows(sequences)
        if window_blocks > most:
            what = "the KV cache of one sequence in layers with a sliding window"
            raise _no_room(window_blocks * window_bytes, what, room)
    wanted = blocks * sequences
    if full_bytes:
        wanted = min(wanted, (room - window_blocks * window_bytes) // full_bytes)
    if wanted < 1:
        raise _no_room(full_bytes, f"a block of {block_size} tokens of KV cache", room)
    return Shares(sequences, wanted, window_blocks)


def _no_room(size_bytes: int, what: str, room: int) -> CapacityError:
    return CapacityError(
        f"{what} takes {format_bytes(size_bytes)}, and {format_bytes(room)} are there for it: "
        "raise kv_cache_memory_bytes, or choose a smaller model"
    )

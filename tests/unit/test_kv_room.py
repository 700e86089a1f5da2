"""How many blocks each kind of layer gets, and for how many sequences they are enough."""

from collections.abc import Callable

import pytest

from tokenmill.errors import CapacityError
from tokenmill.models.kv_room import Shares, share_room


def needed(sequences: int) -> int:
    return 7 * sequences + 5


def share(
    block_bytes: tuple[int, int],
    room: int,
    *,
    blocks: int,
    windows: Callable[[int], int] | None = needed,
) -> Shares:
    return share_room(room, block_bytes, block_size=16, blocks=blocks, sequences=8, windows=windows)


def test_without_a_window_all_layers_share_a_pool() -> None:
    assert share((10, 30), 4000, blocks=20, windows=None) == (8, 100, 0)
    assert share((10, 30), 10**9, blocks=20, windows=None) == (8, 160, 0)


def test_layers_with_a_window_come_first_and_the_others_get_the_rest() -> None:
    room = 2 * 30 * needed(8)
    shares = share((10, 30), room, blocks=1000)
    assert shares == (8, (room - 30 * needed(8)) // 10, needed(8))


def test_where_windows_would_take_more_than_half_fewer_sequences_run() -> None:
    room = 2 * 30 * needed(3)
    shares = share((10, 30), room, blocks=20)
    assert (shares.sequences, shares.window_blocks) == (3, needed(3))
    assert shares.blocks == 3 * 20


def test_if_all_layers_have_a_window_they_get_all() -> None:
    shares = share((0, 30), 30 * needed(8), blocks=20)
    assert shares == (8, 160, needed(8))


@pytest.mark.parametrize(
    ("block_bytes", "room", "message"),
    [
        ((10, 30), 30 * 5, "layers with a sliding window takes .* are there for it"),
        ((0, 30), 30 * (needed(1) - 1), "layers with a sliding window takes"),
    ],
)
def test_a_window_that_does_not_fit_is_said(
    block_bytes: tuple[int, int], room: int, message: str
) -> None:
    with pytest.raises(CapacityError, match=message):
        share(block_bytes, room, blocks=20)


def test_a_block_that_does_not_fit_is_said() -> None:
    with pytest.raises(CapacityError, match=r"a block of 16 tokens of KV cache takes 40 .*39 "):
        share((10, 30), 39, blocks=20, windows=None)

"""Layers with a window give back what is behind it, and share what is in it."""

import numpy as np
import pytest
from fake_model import FakeModel, make_limits

from tokenmill.backends.base import BLOCK_SIZE, window_blocks_for
from tokenmill.engine.sequence import Sequence, make_sequence
from tokenmill.engine.step_loop import StepLoop
from tokenmill.kv.window_blocks import GONE, WindowBlocks, WindowTable
from tokenmill.sampling.params import SamplingParams

WINDOW = 20
LIMITS = make_limits(
    blocks=40,
    blocks_per_sequence=20,
    window=WINDOW,
    window_blocks=window_blocks_for(WINDOW, num_sequences=4, step_tokens=16),
)


def make_loop() -> StepLoop:
    return StepLoop(FakeModel(LIMITS))


def add(loop: StepLoop, prompt: list[int], max_tokens: int) -> Sequence:
    sequence = make_sequence(
        "the prompt",
        prompt,
        SamplingParams(temperature=0, max_tokens=max_tokens),
        seed=0,
        eos_ids=(),
        limits=LIMITS,
        max_model_len=10_000,
    )
    loop.scheduler.add(sequence)
    return sequence


def finish(loop: StepLoop) -> int:
    """Run until nothing is left; the most blocks of layers with a window that were in use."""
    windows, most = loop.scheduler.windows, 0
    assert windows is not None
    while loop.has_work:
        loop.turn()
        loop.scheduler.check()
        most = max(most, windows.pool.num_blocks - windows.pool.num_free)
    return most


def test_a_long_sequence_holds_no_more_than_its_window() -> None:
    loop = make_loop()
    sequence = add(loop, list(range(100)), max_tokens=150)
    # The window within three blocks, and the chunks of two steps.
    assert finish(loop) <= 3 + 2 * 2
    assert len(sequence.output) == 150


def test_what_is_in_the_window_is_found_again() -> None:
    loop = make_loop()
    prompt = list(range(70))
    first = add(loop, prompt, max_tokens=2)
    finish(loop)
    second, other = add(loop, [*prompt, 7, 7], max_tokens=2), add(loop, [5, *prompt], max_tokens=2)
    finish(loop)
    assert (first.num_cached, second.num_cached, other.num_cached) == (0, 64, 0)


def test_where_the_window_is_lost_the_prompt_is_computed_again() -> None:
    loop = make_loop()
    prompt = list(range(70))
    add(loop, prompt, max_tokens=2)
    finish(loop)
    windows = loop.scheduler.windows
    assert windows is not None
    taken = windows.pool.allocate(windows.pool.num_free)  # so that all contents are forgotten
    windows.pool.free(taken)
    again = add(loop, prompt, max_tokens=2)
    finish(loop)
    assert again.num_cached == 0


def test_a_shorter_beginning_is_taken_where_a_block_is_missing() -> None:
    windows = WindowBlocks(WINDOW, 10)
    present = {0: 5, 1: 6, 3: 8, 4: 9}
    # At 80 the token sees from 61 on, so block 3 too; at 64 it sees block 2, which is missing.
    assert windows.longest_start(80, present.get) == (80, [GONE, GONE, GONE, 8, 9])
    assert windows.longest_start(64, present.get) == (32, [5, 6])
    assert windows.longest_start(37, present.get) == (32, [5, 6])
    assert windows.longest_start(32, {}.get) == (0, [])


def test_trimming_keeps_what_the_next_token_sees() -> None:
    windows = WindowBlocks(WINDOW, 10)
    table = WindowTable()
    windows.extend(table, 100)
    windows.trim(table, 100)  # which sees from 81 on
    assert table.num_gone == 81 // BLOCK_SIZE
    assert len(table.held) == 2
    windows.trim(table, 50)
    assert len(table.held) == 2
    windows.check([table])
    windows.release(table)
    windows.check([])


def test_a_table_that_disagrees_is_found() -> None:
    windows = WindowBlocks(WINDOW, 10)
    table = WindowTable()
    windows.extend(table, 40)
    table.blocks[0] = GONE
    with pytest.raises(AssertionError):
        windows.check([table])


@pytest.mark.parametrize("window", [1, 2, 16, 17, 512])
def test_the_pool_is_a_few_blocks_more_than_the_windows(window: int) -> None:
    blocks = np.array([window_blocks_for(window, num_sequences=n, step_tokens=64) for n in (1, 9)])
    per_sequence = (blocks[1] - blocks[0]) / 8
    assert -(-window // BLOCK_SIZE) <= per_sequence <= window / BLOCK_SIZE + 6

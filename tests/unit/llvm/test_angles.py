"""Tables of rotary angles, filled as far as steps have reached."""

import numpy as np
import pytest

from tokenmill.backends.llvm import angles as module
from tokenmill.backends.llvm.angles import AngleTable
from tokenmill.errors import CapacityError
from tokenmill.ir.numerics import Angles

PAIRS = 5
ANGLES = Angles.of(2 * PAIRS, theta=100.0)


@pytest.mark.parametrize("positions", [1, 7, 8, 30])
@pytest.mark.parametrize("steps", [(0,), (0, 6, 5, 29), (29,), (3, 7, 8)])
def test_every_position_that_was_reached_is_right(
    positions: int, steps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SLICE", 8)
    table = AngleTable(ANGLES, positions)
    for step in steps:
        last = min(step, positions - 1)
        table.reach(last)
        cosines, sines = ANGLES.turns(np.arange(last + 1))
        np.testing.assert_array_equal(table._table[: last + 1, 0, :PAIRS], cosines)
        np.testing.assert_array_equal(table._table[: last + 1, 1, :PAIRS], sines)


def test_what_nobody_reaches_is_not_computed() -> None:
    table = AngleTable(ANGLES, 2**20)
    table.reach(10)
    assert table._num_ready < 2**20
    assert not table._table[2**19].any()


def test_a_table_beyond_all_memory_is_refused() -> None:
    with pytest.raises(CapacityError, match="give max_model_len, so"):
        AngleTable(ANGLES, 2**40)

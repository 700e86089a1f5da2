"""Tables of rotary angles: cosines and sines of every position that a step may read."""

import numpy as np

from tokenmill.errors import CapacityError
from tokenmill.ir.numerics import Angles
from tokenmill.ir.order import padded_head

_SLICE = 4096
"""Positions whose angles are computed at a time, which bounds the temporaries."""


class AngleTable:
    """[positions, 2, half a stored head]: cosines, then sines, filled as far as steps have reached.

    A model's context may be far longer than any text that it is given: pages of the table that
    nobody has reached take neither time nor memory.
    """

    def __init__(self, angles: Angles, positions: int) -> None:
        shape = (positions, 2, padded_head(2 * len(angles.frequencies)) // 2)
        try:
            self._table = np.zeros(shape, np.float32)
        except MemoryError:
            raise CapacityError(
                f"there is no memory for the rotary angles of {positions} positions: "
                "give max_model_len, so that there are fewer"
            ) from None
        self._angles = angles
        self._num_ready = 0

    @property
    def address(self) -> int:
        return int(self._table.ctypes.data)

    def reach(self, position: int) -> None:
        """Have the angles of all positions up to this one."""
        assert position < len(self._table), (position, len(self._table))
        pairs = len(self._angles.frequencies)
        while self._num_ready <= position:
            part = self._table[self._num_ready : self._num_ready + _SLICE]
            positions = np.arange(self._num_ready, self._num_ready + len(part))
            part[:, 0, :pairs], part[:, 1, :pairs] = self._angles.turns(positions)
            self._num_ready += len(part)

"""The blocks of layers with a sliding window, which a sequence gives back behind the window.

Such layers have a pool of their own, so large that it never runs out for as many sequences as can
run (`window_blocks_for`): nobody is preempted for its sake. A table has an entry for each block of
the sequence from its first position on; those behind the window are GONE.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tokenmill.backends.base import BLOCK_SIZE
from tokenmill.kv.block_pool import BlockPool, blocks_for

GONE = -1


@dataclass
class WindowTable:
    """The blocks of one sequence; the first `num_gone` are GONE."""

    blocks: list[int] = field(default_factory=list)
    num_gone: int = 0

    @property
    def held(self) -> list[int]:
        return self.blocks[self.num_gone :]


class WindowBlocks:
    """The pool of layers that see `window` positions, and who holds what of it."""

    def __init__(self, window: int, num_blocks: int) -> None:
        assert window > 0
        self.window = window
        self.pool = BlockPool(num_blocks)

    def first_seen(self, position: int) -> int:
        """The index of the first block that a token at `position` sees."""
        return max(0, position + 1 - self.window) // BLOCK_SIZE

    def longest_start(self, limit: int, find: Callable[[int], int | None]) -> tuple[int, list[int]]:
        """How many positions, at most `limit`, are computed for a sequence that goes on there.

        Also the blocks that its next token then sees, those before them GONE. `find` gives the
        block with the content of an index, if there is one.
        """
        while limit:
            first, stop = self.first_seen(limit), blocks_for(limit)
            found = [find(index) for index in range(first, stop)]
            missing = [first + place for place, block in enumerate(found) if block is None]
            if not missing:
                return limit, [GONE] * first + [block for block in found if block is not None]
            limit = missing[-1] * BLOCK_SIZE
        return 0, []

    def adopt(self, shared: Sequence[int]) -> WindowTable:
        """A table that starts with blocks of others."""
        num_gone = sum(block == GONE for block in shared)
        self.pool.share(shared[num_gone:])
        return WindowTable(list(shared), num_gone)

    def extend(self, table: WindowTable, end: int) -> None:
        """Have places for all positions before `end`."""
        table.blocks += self.pool.allocate(max(0, blocks_for(end) - len(table.blocks)))

    def trim(self, table: WindowTable, position: int) -> None:
        """Give back what no token from `position` on sees."""
        first = min(self.first_seen(position), len(table.blocks))
        if first > table.num_gone:
            self.pool.free(table.blocks[table.num_gone : first])
            table.blocks[table.num_gone : first] = [GONE] * (first - table.num_gone)
            table.num_gone = first

    def release(self, table: WindowTable) -> None:
        """Give back everything, the end first."""
        self.pool.free(reversed(table.held))

    def name(self, table: WindowTable, index: int, name: bytes) -> None:
        """The block at an index is found by its content from now on, if it is still there."""
        if index >= table.num_gone:
            self.pool.name(table.blocks[index], name)

    def check(self, tables: Iterable[WindowTable]) -> None:
        """Prove that the tables agree with the pool. Raises AssertionError."""
        tables = list(tables)
        for table in tables:
            assert table.blocks[: table.num_gone] == [GONE] * table.num_gone, table
        self.pool.check(table.held for table in tables)

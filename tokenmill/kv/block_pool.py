"""The blocks of the KV cache, counted: who may write where is decided here and nowhere else.

The pool hands out block ids; the arrays behind them belong to the backend. A block is either
free or referenced by one or more block tables. Free blocks are handed out in the order in
which they became free, so the block that was used longest ago is overwritten first.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from tokenmill.backends.base import BLOCK_SIZE


def blocks_for(num_positions: int) -> int:
    """Blocks that hold this many positions."""
    return -(-num_positions // BLOCK_SIZE)


class BlockPool:
    """Reference counts of `num_blocks` blocks of BLOCK_SIZE positions each."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one reference; there must be as many free."""
        assert count <= self.num_free, (count, self.num_free)
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block: one more table holds it. A free block is revived."""
        for block in blocks:
            self._free.pop(block, None)
            self._references[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Drop a reference of each block; a block without references becomes free.

        The blocks of a table are given back last one first: the end of a sequence is of less
        use to others than its beginning.
        """
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is freed once too often"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Prove that `tables`, all the block tables there are, agree with the counts.

        Every block is free or referenced exactly as often as it occurs in tables, and no table
        holds a block twice. Raises AssertionError.
        """
        occurrences: Counter[int] = Counter()
        for table in tables:
            assert len(set(table)) == len(table), f"a table holds a block twice: {table}"
            occurrences.update(table)
        assert all(0 <= block < self.num_blocks for block in occurrences), occurrences
        for block, references in enumerate(self._references):
            assert occurrences[block] == references, (block, occurrences[block], references)
            assert (block in self._free) == (references == 0), (block, references)

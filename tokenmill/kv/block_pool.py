"""The blocks of the KV cache, counted: who may write where is decided here and nowhere else.

The pool hands out block ids; the arrays behind them belong to the backend. A block is either
free or referenced by one or more block tables. A block whose content has a name stays findable
when it becomes free, until it is handed out again; blocks without a name are handed out first,
then the named block that was used longest ago.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence

from tokenmill.backends.base import BLOCK_SIZE

_MAX_RECENT = 128
"""Evictions that are remembered by their blocks."""


def blocks_for(num_positions: int) -> int:
    """Blocks that hold this many positions."""
    return -(-num_positions // BLOCK_SIZE)


class BlockPool:
    """Reference counts and names of `num_blocks` blocks of BLOCK_SIZE positions each."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._by_name: dict[bytes, int] = {}
        # Free blocks, the next one to be handed out first.
        self._empty = OrderedDict.fromkeys(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self.num_evictions = 0  # blocks that were handed out although they could be found by name
        self._evicted: deque[int] = deque(maxlen=_MAX_RECENT)

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks that can still be found by name."""
        return len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one reference; there must be as many free."""
        assert count <= self.num_free, (count, self.num_free)
        return [self._allocate_one() for _ in range(count)]

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block: one more table holds it. A free block is revived."""
        for block in blocks:
            self._empty.pop(block, None)
            self._cached.pop(block, None)
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
                queue = self._empty if self._names[block] is None else self._cached
                queue[block] = None

    def name(self, block: int, name: bytes) -> None:
        """From now on the block, which a table holds, is found by its content.

        It stays without a name where another block has the same content.
        """
        assert self._references[block] > 0, f"block {block} is free"
        if name not in self._by_name and self._names[block] is None:
            self._by_name[name] = block
            self._names[block] = name

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The blocks with these names, up to the first that is in no block."""
        found = []
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def touch(self, block: int) -> None:
        """A free block was of use: it is handed out after all others."""
        if block in self._cached:
            self._cached.move_to_end(block)

    def num_unused(self, blocks: Iterable[int]) -> int:
        """How many of the blocks are free."""
        return sum(self._references[block] == 0 for block in blocks)

    def last_evicted(self) -> list[int]:
        """The blocks that lost their content last, the latest at the end."""
        return list(self._evicted)

    def snapshot(self) -> tuple[list[int], list[bool]]:
        """The references of each block, and whether it can be found by name."""
        return self._references.copy(), [name is not None for name in self._names.copy()]

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Prove that `tables`, all the block tables there are, agree with the counts.

        Every block is free or referenced exactly as often as it occurs in tables, no table
        holds a block twice, and names and blocks point at each other. Raises AssertionError.
        """
        occurrences: Counter[int] = Counter()
        for table in tables:
            assert len(set(table)) == len(table), f"a table holds a block twice: {table}"
            occurrences.update(table)
        assert all(0 <= block < self.num_blocks for block in occurrences), occurrences
        for block, references in enumerate(self._references):
            assert occurrences[block] == references, (block, occurrences[block], references)
            name = self._names[block]
            assert (block in self._empty) == (references == 0 and name is None), block
            assert (block in self._cached) == (references == 0 and name is not None), block
            assert name is None or self._by_name[name] == block, block
        assert len(self._by_name) == sum(name is not None for name in self._names)

    def _allocate_one(self) -> int:
        block, _ = (self._empty or self._cached).popitem(last=False)
        name, self._names[block] = self._names[block], None
        if name is not None:
            del self._by_name[name]
            self.num_evictions += 1
            self._evicted.append(block)
        self._references[block] = 1
        return block

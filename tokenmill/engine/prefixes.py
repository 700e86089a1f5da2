"""What a sequence that waits need not compute: blocks of its parent, or of the prefix cache."""

from collections.abc import Collection
from functools import partial
from typing import NamedTuple

from tokenmill.backends.base import BLOCK_SIZE
from tokenmill.engine.sequence import NO_SLOT, Sequence
from tokenmill.kv.block_pool import BlockPool
from tokenmill.kv.window_blocks import WindowBlocks


class Start(NamedTuple):
    """Where a sequence begins: `shared` blocks hold what is computed, and a part of `copied`.

    The same of layers with a window: blocks that its next token does not see are GONE.
    """

    shared: list[int]
    copied: int | None
    num_computed: int
    window_shared: list[int]
    window_copied: int | None


class Prefixes:
    """Finds where sequences may begin, and who is about to compute what others will begin with."""

    def __init__(self, pool: BlockPool, windows: WindowBlocks | None, *, has_cache: bool) -> None:
        self._pool = pool
        self._windows = windows
        self._has_cache = has_cache
        # Names of blocks that running sequences will fill with their prompts.
        self._expected: dict[bytes, Sequence] = {}

    def is_ready(self, sequence: Sequence) -> bool:
        """False: another sequence is about to compute what this one would begin with."""
        parent = sequence.parent
        if parent is not None and parent.finish_reason is None and not sequence.num_output:
            return parent.slot != NO_SLOT and parent.num_computed >= sequence.prompt_len
        if not self._expected or sequence.num_reusable < len(sequence.tokens) - 1:
            return True
        names = sequence.names()
        num_found = len(self._pool.find(names))
        return num_found == len(names) or names[num_found] not in self._expected

    def start(self, sequence: Sequence) -> Start:
        """What has been computed already of a sequence that waits."""
        blocks: list[int] = []
        num_computed = 0
        parent = _running_parent(sequence)
        if parent is not None:
            blocks, num_computed = parent.blocks, sequence.prompt_len
        elif self._has_cache:
            blocks = self._pool.find(sequence.names())
            num_computed = len(blocks) * BLOCK_SIZE
        num_computed = min(num_computed, sequence.num_reusable)
        windows: list[int] = []
        if self._windows is not None and num_computed:
            find = partial(self._find_window, sequence)
            num_computed, windows = self._windows.longest_start(num_computed, find)
        num_shared, num_copied = divmod(num_computed, BLOCK_SIZE)
        return Start(
            shared=blocks[:num_shared],
            copied=blocks[num_shared] if num_copied else None,
            num_computed=num_computed,
            window_shared=windows[:num_shared],
            window_copied=windows[num_shared] if num_copied and windows else None,
        )

    def expect(self, sequence: Sequence) -> None:
        """A sequence runs now, and will name the blocks of its prompt."""
        if self._has_cache:
            names = sequence.names()[: sequence.prompt_len // BLOCK_SIZE]
            for name in names[sequence.num_named :]:
                self._expected.setdefault(name, sequence)

    def note_named(self, name: bytes) -> None:
        """A block can be found by its name."""
        self._expected.pop(name, None)

    def forget(self, sequence: Sequence) -> None:
        """A sequence runs no longer."""
        for name in sequence.block_names[sequence.num_named : sequence.prompt_len // BLOCK_SIZE]:
            if self._expected.get(name) is sequence:
                del self._expected[name]

    def check(self, running: Collection[Sequence]) -> None:
        """Raises AssertionError where somebody is expected who does not run."""
        assert set(self._expected.values()) <= set(running)

    def _find_window(self, sequence: Sequence, index: int) -> int | None:
        """The block of layers with a window that holds what `sequence` has at an index."""
        assert self._windows is not None
        names = sequence.names()
        found = self._windows.pool.find(names[index : index + 1])
        parent = _running_parent(sequence)
        if parent is not None:
            table = parent.windows
            found = table.blocks[index : index + 1] if index >= table.num_gone else found
        return found[0] if found else None


def _running_parent(sequence: Sequence) -> Sequence | None:
    """Whose prompt a sequence shares that has said nothing yet."""
    parent = sequence.parent
    if parent is None or parent.slot == NO_SLOT or sequence.num_output:
        return None
    return parent

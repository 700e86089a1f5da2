"""Memory for weights, KV cache and buffers: large, aligned, in huge pages where there are any.

Streaming weights from 2 MiB pages is about a half faster than from 4 KiB pages, and NumPy
aligns to 16 bytes only.
"""

import ctypes
import mmap
import os
import re
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenmill.backends.llvm import cgroup
from tokenmill.errors import CapacityError

ALIGNMENT = 2 << 20  # bytes: a huge page
_PRIVATE = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
)


class Arena:
    """Zeroed memory at an address that is a multiple of 2 MiB.

    Pages come into being when first touched. NumPy views keep the memory alive: `close` gives
    it back at once if there are none, else with the last of them.
    """

    def __init__(self, size_bytes: int, *, huge: bool = True) -> None:
        """Raises CapacityError if the machine, or our control group, has not that much left."""
        left = memory_available_bytes()
        if size_bytes > left:
            raise CapacityError(_too_large(size_bytes, left))
        try:
            # Python's default is shared memory, which Linux gives huge pages only if an
            # administrator says so (shmem_enabled); private memory needs our advice alone.
            self._map: mmap.mmap | None = mmap.mmap(-1, size_bytes + ALIGNMENT, **_PRIVATE)
        except (OSError, OverflowError, ValueError) as error:
            raise CapacityError(_too_large(size_bytes, left)) from error
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._offset = -start % ALIGNMENT
        self.address = start + self._offset
        self.size_bytes = size_bytes
        if huge and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages is slower, not wrong
                self._map.madvise(mmap.MADV_HUGEPAGE)

    def view(
        self, dtype: npt.DTypeLike, shape: tuple[int, ...], offset: int = 0
    ) -> npt.NDArray[Any]:
        """An array over the bytes from `offset`. Raises ValueError if they are not all inside."""
        kind = np.dtype(dtype)
        size = kind.itemsize * prod(shape)
        return np.frombuffer(self.buffer(offset, size), dtype=kind).reshape(shape)

    def buffer(self, offset: int, size: int) -> memoryview:
        """`size` writable bytes from `offset`. Raises ValueError if they are not all inside."""
        if self._map is None:
            raise ValueError("the arena is closed")
        if offset < 0 or size < 0 or offset + size > self.size_bytes:
            raise ValueError(f"bytes {offset} to {offset + size} of an arena of {self.size_bytes}")
        start = self._offset + offset
        return memoryview(self._map)[start : start + size]

    def close(self) -> None:
        """Let go of the memory; a second call does nothing."""
        self._map = None


def memory_available_bytes(root: Path = Path("/")) -> int:
    """What this process can still allocate without swapping or being killed."""
    left = cgroup.memory_left_bytes(root)
    machine = _machine_available_bytes(root / "proc/meminfo")
    return machine if left is None else min(machine, left)


def _machine_available_bytes(meminfo: Path) -> int:
    """Linux says what is available; elsewhere take all there is for it."""
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE


def _too_large(size_bytes: int, left: int) -> str:
    return (
        f"{size_bytes / 2**30:.2f} GiB of memory are needed and {left / 2**30:.2f} GiB are left: "
        "choose a smaller model, a smaller context or fewer sequences, or give the process more"
    )

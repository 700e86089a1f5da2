"""What is rebuilt at need (compiled code, packed weights) stays within a limit on disk.

What was used least recently goes first. Whoever uses an entry sets its time of access, since
many file systems do not.
"""

import math
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tokenmill.errors import UsageError
from tokenmill.models.home import objects_dir, packed_dir

SETTING = "TOKENMILL_CACHE_GB"
DEFAULT_GB = 30.0
_CLOCK_NS = 20_000_000  # how far the clock of a file system may lag behind ours


@dataclass(frozen=True, kw_only=True)
class _Entry:
    path: Path
    size_bytes: int
    used_ns: int


def cache_limit_bytes() -> int:
    """What TOKENMILL_CACHE_GB allows. Raises UsageError where it is no such number."""
    text = os.environ.get(SETTING) or str(DEFAULT_GB)
    try:
        limit_gb = float(text)
    except ValueError:
        limit_gb = math.nan
    if not 0 <= limit_gb < math.inf:
        raise UsageError(f"{SETTING} is {text!r}, but must be a number of gigabytes, as in 20")
    return int(limit_gb * 1e9)


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """Bytes on disk."""

    compiled_code_bytes: int
    packed_weights_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.compiled_code_bytes + self.packed_weights_bytes


def measure_cache(home: Path | None = None) -> CacheSize:
    """How much of the disk is taken by what can be rebuilt."""
    return CacheSize(
        compiled_code_bytes=sum(entry.size_bytes for entry in _entries(objects_dir(home))),
        packed_weights_bytes=sum(entry.size_bytes for entry in _entries(packed_dir(home))),
    )


def clear_cache(home: Path | None = None) -> int:
    """Delete all of it; returns the bytes that became free.

    A process that runs keeps what it has opened. Raises UsageError, after all others are deleted,
    where an entry cannot be.
    """
    freed, failed = 0, ""
    for entry in _all_entries(home):
        try:
            entry.path.unlink(missing_ok=True)
            freed += entry.size_bytes
        except OSError as error:
            failed = f"cannot delete {entry.path} ({error.strerror}): see who owns it"
    if failed:
        raise UsageError(failed)
    return freed


def evict(limit_bytes: int, keep_since_ns: int, home: Path | None = None) -> int:
    """Delete entries until the rest fits; returns the bytes that became free.

    Nothing used at `keep_since_ns` or later is deleted, whatever the limit.
    """
    entries = sorted(_all_entries(home), key=lambda entry: entry.used_ns)
    excess = sum(entry.size_bytes for entry in entries) - limit_bytes
    freed = 0
    for entry in entries:
        if freed >= excess or entry.used_ns >= keep_since_ns - _CLOCK_NS:
            break
        with suppress(OSError):  # gone already, or in a folder that we may not change
            entry.path.unlink()
            freed += entry.size_bytes
    return freed


def _all_entries(home: Path | None) -> list[_Entry]:
    return [*_entries(objects_dir(home)), *_entries(packed_dir(home))]


def _entries(folder: Path) -> Iterator[_Entry]:
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):  # another process was faster
            found = path.stat()
            is_whole = not path.name.startswith(("tmp-", "."))  # others are being written
            if is_whole and stat.S_ISREG(found.st_mode):
                yield _Entry(path=path, size_bytes=found.st_size, used_ns=found.st_atime_ns)

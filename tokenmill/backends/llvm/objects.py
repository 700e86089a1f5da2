"""A disk cache of compiled objects and packed weights. What it returns has been checked.

One file an entry: a header of 4096 bytes, the payload, and a table with one digest per MiB of
payload. The header carries a SHA-256 of itself and of the table. Objects are executed, so their
digests are SHA-256; weights are large and only read, so theirs are CRC-32, which is several
times faster. Files are written under a temporary name, fsynced and renamed. One that is
damaged, truncated or not ours is deleted and built again.
"""

import hashlib
import logging
import os
import re
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tokenmill import __version__
from tokenmill.backends.llvm.target import Row, host_cpu, host_triple
from tokenmill.fingerprint import code_fingerprint

HEADER_SIZE = 4096  # a page, so that a payload can be mapped
CHUNK_SIZE = 1 << 20
STALE_AFTER_S = 3600.0

_MAGIC = b"tokenmil"
_VERSION = 1
_SHA256, _CRC32 = 1, 2
_DIGEST_SIZES = {_SHA256: 32, _CRC32: 4}
_FIELDS = struct.Struct("<8sIIQ128s32s")  # magic, version, algorithm, length, key, table digest

_CODE = ("backends", "backends/llvm", "ir", "passes")
"""Folders of the source that decides what an entry holds, given the parts of its key."""

_log = logging.getLogger(__name__)


def cache_key(*parts: str | bytes | int, row: Row) -> str:
    """A name for what this version of the code makes from `parts` for this host and row."""
    from llvmlite import __version__ as llvmlite_version

    host = (row.name, row.cpu, row.features, host_cpu(), host_triple(), llvmlite_version)
    digest = hashlib.sha256()
    for part in (*parts, *host, __version__, code_fingerprint(*_CODE)):
        raw = part if isinstance(part, bytes) else str(part).encode()
        digest.update(f"{type(part).__name__} {len(raw)} ".encode() + raw)
    return digest.hexdigest()


@dataclass(frozen=True)
class Payload:
    """An entry whose header is sound: `length` bytes at `offset` of `file`, not yet checked."""

    file: BinaryIO
    length: int
    algorithm: int
    table: bytes
    offset: int = HEADER_SIZE

    def read_into(self, target: memoryview, num_threads: int = 2) -> bool:
        """Fill `target`, of `length` bytes; says whether every byte is as it was written."""
        return self._read_chunks(lambda start, size: target[start : start + size], num_threads)

    def verify(self, num_threads: int = 2) -> bool:
        """The same check for a payload that will be mapped rather than read."""
        return self._read_chunks(lambda _, size: memoryview(bytearray(size)), num_threads)

    def _read_chunks(self, place: Callable[[int, int], memoryview], num_threads: int) -> bool:
        def check(starts: Sequence[int]) -> bool:
            return all(self._read_chunk(start, place) for start in starts)

        starts = range(0, self.length, CHUNK_SIZE)
        if num_threads <= 1 or len(starts) <= num_threads:
            return check(starts)
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(num_threads) as pool:
            return all(pool.map(check, [starts[i::num_threads] for i in range(num_threads)]))

    def _read_chunk(self, start: int, place: Callable[[int, int], memoryview]) -> bool:
        chunk = place(start, min(CHUNK_SIZE, self.length - start))
        done = 0
        while done < len(chunk):
            got = os.preadv(self.file.fileno(), [chunk[done:]], self.offset + start + done)
            if not got:
                return False
            done += got
        size = _DIGEST_SIZES[self.algorithm]
        at = start // CHUNK_SIZE * size
        return _digest(self.algorithm, chunk) == self.table[at : at + size]


class ObjectCache:
    """Entries by key in one directory, which several processes may fill at once.

    An entry's time of access is that of its last use. A directory that cannot be used costs one
    warning in the log and nothing else: `get` finds nothing and `put` keeps nothing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._has_warned = False

    def get(self, key: str) -> bytes | None:
        """The entry's bytes, checked, or None."""
        found = self.read_into(key, lambda size: memoryview(bytearray(size)))
        return None if found is None else bytes(found)

    def put(self, key: str, data: bytes) -> None:
        """Keep `data` under `key`, in place of what was there."""
        self._write(key, _SHA256, [data])

    def get_or_build(self, key: str, build: Callable[[], bytes]) -> bytes:
        """The entry, built and kept if it is not there."""
        data = self.get(key)
        if data is None:
            data = build()
            self.put(key, data)
        return data

    def put_stream(self, key: str, parts: Iterable[bytes | memoryview]) -> None:
        """Keep the parts one after another; for weights, which are never executed."""
        self._write(key, _CRC32, parts)

    def read_into(
        self, key: str, allocate: Callable[[int], memoryview], *, num_threads: int = 2
    ) -> memoryview | None:
        """The entry's payload in memory that `allocate(size_bytes)` gives, checked, or None."""
        with self.open_payload(key) as payload:
            if payload is None:
                return None
            target = allocate(payload.length)
            if payload.read_into(target, num_threads):
                return target
        self._discard(key, "is damaged")
        return None

    @contextmanager
    def open_payload(self, key: str) -> Iterator[Payload | None]:
        """The entry's file and where its payload lies, or None; call `verify` before mapping it."""
        file = self._open(key)
        if file is None:
            yield None
            return
        with file:
            payload = _read_header(file, key)
            if payload is None:
                self._discard(key, "is damaged, or not ours")
            yield payload

    def path(self, key: str) -> Path:
        """Where the entry lies. Keys are file names of at most 128 characters."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", key):
            raise ValueError(f"not a cache key: {key!r}")
        return self.directory / f"{key}.tmc"

    def _open(self, key: str) -> BinaryIO | None:
        try:
            file = self.path(key).open("rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn("read", error)
            return None
        with suppress(OSError):  # read-only, or another user's: it looks unused, and that is all
            os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
        return file

    def _write(self, key: str, algorithm: int, parts: Iterable[bytes | memoryview]) -> None:
        target = self.path(key)
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            _remove_stale(self.directory)
            handle, name = tempfile.mkstemp(prefix="tmp-", dir=self.directory)
        except OSError as error:
            self._warn("written", error)
            return
        try:
            with os.fdopen(handle, "wb") as file:
                _write_entry(file, key, algorithm, parts)
            os.replace(name, target)
        except OSError as error:
            self._warn("written", error)
        finally:
            with suppress(FileNotFoundError):  # renamed, which is the rule
                os.unlink(name)

    def _discard(self, key: str, why: str) -> None:
        _log.info("cache entry %s %s; it is built again", self.path(key), why)
        try:
            self.path(key).unlink(missing_ok=True)
        except OSError as error:
            self._warn("cleaned", error)

    def _warn(self, verb: str, error: OSError) -> None:
        if not self._has_warned:
            _log.warning(
                "the cache in %s cannot be %s (%s); work goes on without it, and every start "
                "builds anew: make it writable, or choose another directory",
                self.directory,
                verb,
                error.strerror or error,
            )
        self._has_warned = True


def _write_entry(
    file: BinaryIO, key: str, algorithm: int, parts: Iterable[bytes | memoryview]
) -> None:
    """Header last: a file cut short by a crash has none."""
    file.write(bytes(HEADER_SIZE))
    table = bytearray()
    length = 0
    for chunk in _rechunk(parts):
        file.write(chunk)
        table += _digest(algorithm, chunk)
        length += len(chunk)
    file.write(table)
    file.seek(0)
    file.write(_header(key, algorithm, length, bytes(table)))
    file.flush()
    os.fsync(file.fileno())


def _rechunk(parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same bytes in pieces of CHUNK_SIZE, the last one shorter; copies only at the seams."""
    pending = bytearray()
    for part in parts:
        view = memoryview(part).cast("B")
        if pending:
            missing = CHUNK_SIZE - len(pending)
            pending += view[:missing]
            view = view[missing:]
            if len(pending) < CHUNK_SIZE:
                continue
            yield bytes(pending)
        whole = len(view) // CHUNK_SIZE * CHUNK_SIZE
        for start in range(0, whole, CHUNK_SIZE):
            yield view[start : start + CHUNK_SIZE]
        pending = bytearray(view[whole:])
    if pending:
        yield bytes(pending)


def _header(key: str, algorithm: int, length: int, table: bytes) -> bytes:
    table_digest = hashlib.sha256(table).digest()
    fields = _FIELDS.pack(_MAGIC, _VERSION, algorithm, length, key.encode(), table_digest)
    return (fields + hashlib.sha256(fields).digest()).ljust(HEADER_SIZE, b"\0")


def _read_header(file: BinaryIO, key: str) -> Payload | None:
    """The payload that a sound header of this key describes; None for anything else."""
    header = file.read(HEADER_SIZE)
    if len(header) < HEADER_SIZE:
        return None
    _, _, algorithm, length, _, _ = _FIELDS.unpack_from(header)
    if algorithm not in _DIGEST_SIZES:
        return None
    table_size = -(-length // CHUNK_SIZE) * _DIGEST_SIZES[algorithm]
    if os.fstat(file.fileno()).st_size != HEADER_SIZE + length + table_size:
        return None
    file.seek(HEADER_SIZE + length)
    table = file.read(table_size)
    if header != _header(key, algorithm, length, table):
        return None
    return Payload(file, length, algorithm, table)


def _digest(algorithm: int, chunk: bytes | memoryview) -> bytes:
    if algorithm == _SHA256:
        return hashlib.sha256(chunk).digest()
    return zlib.crc32(chunk).to_bytes(4, "little")


def _remove_stale(directory: Path) -> None:
    """Drop what writers that were killed left behind."""
    for path in directory.glob("tmp-*"):
        with suppress(FileNotFoundError):  # its writer finished, or another process was faster
            if time.time() - path.stat().st_mtime > STALE_AFTER_S:
                path.unlink()

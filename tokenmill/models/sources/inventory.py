"""What lies in the folder of models, how much of the disk it takes, and how it is removed."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tokenmill.errors import ModelNotFoundError, UsageError
from tokenmill.models.home import models_dir
from tokenmill.models.sources.aliases import ALIASES
from tokenmill.models.sources.growth import folder_size
from tokenmill.models.sources.receipt import FILE_NAME, FileRecord, read_receipt
from tokenmill.models.sources.shelf import Shelf, make_shelf, shelf_named
from tokenmill.models.sources.spec import HubSource, LocalSource, parse_source


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What one shelf holds.

    `name` is that of the last pull, or the shelf's own where nothing says it. `path` is None
    where the model is not whole. `model_bytes` count its files, `shared_bytes` those of them
    that lie elsewhere and that other programs use too, `partial_bytes` an unfinished download.
    """

    name: str
    spec: str | None
    shelf: Shelf
    path: Path | None
    model_bytes: int
    shared_bytes: int
    partial_bytes: int

    @property
    def size_bytes(self) -> int:
        return self.model_bytes + self.partial_bytes


def list_holdings(home: Path | None = None) -> list[Holding]:
    """What is on disk, by name."""
    try:
        entries = [entry.name for entry in os.scandir(models_dir(home)) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UsageError(
            f"cannot read {error.filename} ({error.strerror}): set TOKENMILL_HOME to a folder that "
            "can be read"
        ) from error
    names = {entry.removesuffix(".partial") for entry in entries}
    holdings = (_look_at(shelf_named(name, home)) for name in names)
    return sorted(holdings, key=lambda holding: holding.name)


def remove_model(name: str, home: Path | None = None) -> Holding:
    """Delete what goes by a name, finished or not, and say what that was.

    Raises ModelNotFoundError where nothing on disk has the name, UsageError where it is being
    fetched, or lies elsewhere than below the home.
    """
    holding = _find(name, home)
    _check_place(holding)
    with holding.shelf.locked_now(holding.name):
        for folder in (holding.shelf.folder, holding.shelf.partial):
            _delete(folder)
    return holding


def _look_at(shelf: Shelf) -> Holding:
    receipt = read_receipt(shelf.folder)
    records = receipt.files if receipt else ()
    sizes = {record: _present_bytes(shelf, record) for record in records}
    is_whole = receipt and all(sizes[record] == record.size_bytes for record in records)
    shared = sum(size for record, size in sizes.items() if os.path.isabs(record.path))
    return Holding(
        name=receipt.model.name if receipt else _alias_of(shelf) or shelf.folder.name,
        spec=receipt.spec if receipt else None,
        shelf=shelf,
        path=receipt.model.path if receipt and is_whole else None,
        model_bytes=sum(sizes.values()) if receipt else folder_size(shelf.folder),
        shared_bytes=shared,
        partial_bytes=folder_size(shelf.partial),
    )


def _present_bytes(shelf: Shelf, record: FileRecord) -> int:
    try:
        return os.stat(shelf.folder / record.path).st_size
    except OSError:  # deleted by hand, or by the program that shares it
        return 0


def _alias_of(shelf: Shelf) -> str | None:
    """The short name of what a shelf without a receipt is for."""
    return next((name for name in ALIASES if _shelf_of(name, None) == shelf.folder.name), None)


def _shelf_of(name: str, home: Path | None) -> str:
    """The name of the shelf for a model, or around a path. Raises as `parse_source` does."""
    source = parse_source(name)
    if not isinstance(source, LocalSource):
        return make_shelf(source, home).folder.name
    models, path = models_dir(home).resolve(), source.path.resolve()
    if path == models or not path.is_relative_to(models):
        raise UsageError(
            f"{source.path} was not fetched and does not lie in {models}: delete it yourself"
        )
    return path.relative_to(models).parts[0].removesuffix(".partial")


def _find(name: str, home: Path | None) -> Holding:
    holdings = list_holdings(home)
    for holding in holdings:
        if name in (holding.name, holding.shelf.folder.name):
            return holding
    try:
        wanted = _shelf_of(name, home)
    except ModelNotFoundError:
        wanted = ""
    for holding in holdings:
        if holding.shelf.folder.name == wanted:
            return holding
    there = ", ".join(holding.name for holding in holdings) or "nothing"
    raise ModelNotFoundError(f"{name!r} is not in {models_dir(home)}, which holds {there}")


def _check_place(holding: Holding) -> None:
    """Raise unless all that would be deleted is ours, and lies where we put it."""
    for folder in (holding.shelf.folder, holding.shelf.partial):
        if folder.is_symlink():
            raise UsageError(
                f"{folder} is a link to {folder.resolve()}, outside of tokenmill's home: delete "
                "both yourself"
            )
    if not holding.shared_bytes:
        return
    source = parse_source(holding.spec or "")
    advice = f" `hf cache rm model/{source.repo}` deletes" if isinstance(source, HubSource) else ""
    raise UsageError(
        f"the files of {holding.name} lie in {holding.path or 'another folder'}, outside of "
        f"tokenmill's home, where other programs use them too:{advice} them for all"
    )


def _delete(folder: Path) -> None:
    """Without its receipt first, so that nothing half deleted passes for a model."""
    try:
        (folder / FILE_NAME).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise UsageError(
            f"cannot delete {error.filename or folder} ({error.strerror}): see who owns it"
        ) from error

"""A shelf: the place of one fetched model on disk, and the rules for putting it there.

A model is put together in `NAME.partial`, which is trusted by nobody, and renamed to `NAME`
when all of it has been verified and its receipt is written. One process at a time may do so.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tokenmill.errors import TokenmillError, UsageError
from tokenmill.models.home import make_dir, models_dir, storage_errors, sync_dir
from tokenmill.models.progress import Progress
from tokenmill.models.sources.local import LocalModel
from tokenmill.models.sources.receipt import (
    Receipt,
    find_damage,
    read_receipt,
    restamp,
    write_receipt,
)
from tokenmill.models.sources.spec import HubSource, PackageSource


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """`folder` holds the model and its receipt, `partial` what is being put together."""

    folder: Path
    partial: Path
    lock: Path

    @contextmanager
    def locked(self, progress: Progress, name: str) -> Iterator[None]:
        """Keep other processes from fetching the same model; waits for one that already does."""
        import filelock

        make_dir(self.lock.parent)
        lock = filelock.FileLock(self.lock)
        with storage_errors(self.lock):
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                progress.note(f"waiting for another process that fetches {name}")
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def locked_now(self, name: str) -> Iterator[None]:
        """The same lock, for work that does not wait. Raises UsageError where it is taken."""
        import filelock

        make_dir(self.lock.parent)
        lock = filelock.FileLock(self.lock)
        with storage_errors(self.lock):
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout as error:
                raise UsageError(
                    f"another process fetches {name} at this moment: wait for it or end it, and "
                    "try again"
                ) from error
        try:
            yield
        finally:
            lock.release()

    def install(self, receipt: Receipt) -> LocalModel:
        """Write the receipt into `partial` and make that the model's folder.

        `receipt.model.path` lies in `partial` or outside the shelf. Needs the lock.
        """
        write_receipt(self.partial, receipt)
        with storage_errors(self.folder):
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.partial.rename(self.folder)
            sync_dir(self.folder.parent)
        path = receipt.model.path
        if path.is_relative_to(self.partial):
            path = self.folder / path.relative_to(self.partial)
        return replace(receipt.model, path=path)


def make_shelf(source: HubSource | PackageSource, home: Path | None) -> Shelf:
    """The shelf of a source; nothing is created yet."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", source.spec)[:80]
    slug = f"{readable}-{hashlib.sha256(source.spec.encode()).hexdigest()[:8]}"
    return shelf_named(slug, home)


def shelf_named(slug: str, home: Path | None) -> Shelf:
    """The shelf whose folder has a name."""
    models = models_dir(home)
    return Shelf(
        folder=models / slug, partial=models / f"{slug}.partial", lock=models / f"{slug}.lock"
    )


def find_model(
    shelf: Shelf, source: HubSource | PackageSource, progress: Progress
) -> LocalModel | str:
    """The model on its shelf, or in words why it is not to be had there."""
    receipt = read_receipt(shelf.folder)
    if receipt is None:
        return f"not in {shelf.folder}"
    if isinstance(source, PackageSource) and source.sha256 not in (None, receipt.files[0].sha256):
        return f"{receipt.model.path} has another checksum"
    with progress.task(f"checking {source.name}", receipt.size_bytes) as task:
        damage = find_damage(shelf.folder, receipt, task)
    if damage is not None:
        return damage
    _keep_times(shelf, receipt, progress)
    return replace(receipt.model, name=source.name)


def _keep_times(shelf: Shelf, receipt: Receipt, progress: Progress) -> None:
    """Write down new times of change, so that files that were only copied are hashed once."""
    current = restamp(shelf.folder, receipt)
    if current == receipt:
        return
    try:
        write_receipt(shelf.folder, current)
    except TokenmillError as error:
        progress.note(f"the model is hashed at every start: {error}")

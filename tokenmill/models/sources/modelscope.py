"""Models on ModelScope.

Files are put together on the shelf: each grows under a name that holds its checksum, so that an
interrupted download goes on, and what a branch held before is never continued. ModelScope names
no commit of a whole repository; a branch that moves under a download shows as a wrong checksum.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

from tokenmill.errors import ModelFileError
from tokenmill.models.home import make_dir, require_space, storage_errors
from tokenmill.models.progress import Progress
from tokenmill.models.sources.growth import Meter
from tokenmill.models.sources.http import Client
from tokenmill.models.sources.local import LocalModel, open_local
from tokenmill.models.sources.modelscope_api import (
    Plan,
    RemoteFile,
    hub_errors,
    make_client,
    make_plan,
)
from tokenmill.models.sources.receipt import (
    Receipt,
    find_damage,
    hash_file,
    read_receipt,
    record_file,
)
from tokenmill.models.sources.shelf import Shelf
from tokenmill.models.sources.spec import HubSource


def fetch_from_modelscope(source: HubSource, shelf: Shelf, progress: Progress) -> LocalModel:
    """Download what is missing, verify it, and put it on the shelf. Needs the shelf's lock."""
    client = make_client()
    with hub_errors(source, client):
        plan = make_plan(client, source)
    make_dir(shelf.partial)
    _keep_what_serves(plan, shelf, progress)
    require_space(shelf.partial, plan.size_bytes - _present_bytes(plan, shelf.partial))
    with hub_errors(source, client):
        _download(client, source, plan, shelf.partial, progress)
    return _install(source, plan, shelf, progress)


def _growing(file: RemoteFile, folder: Path) -> Path:
    """Where a file lies until all of the model has been verified."""
    return folder / f"{file.name}.{(file.sha256 or str(file.size_bytes))[:12]}"


def _present_bytes(plan: Plan, folder: Path) -> int:
    grown = (_growing(file, folder) for file in plan.files)
    return sum(path.stat().st_size for path in grown if path.exists())


def _keep_what_serves(plan: Plan, shelf: Shelf, progress: Progress) -> None:
    """Leave in `partial` only files of the plan; link those that the shelf holds already."""
    wanted = {_growing(file, shelf.partial): file for file in plan.files}
    with storage_errors(shelf.partial):
        for path in shelf.partial.iterdir():
            file = wanted.get(path)
            # Without a checksum nothing would show that it is a part of something else.
            if file is None or file.sha256 is None or path.stat().st_size > file.size_bytes:
                path.unlink()
    receipt = read_receipt(shelf.folder)
    with progress.task("looking at what is on disk") as task:
        if receipt is None or find_damage(shelf.folder, receipt, task):
            return
    kept = {(record.path, record.sha256): shelf.folder / record.path for record in receipt.files}
    for path, file in wanted.items():
        old = kept.get((file.name, file.sha256 or ""))
        if old and not path.exists():
            with contextlib.suppress(OSError):  # a file system without links: fetch it again
                path.hardlink_to(old)


def _download(
    client: Client, source: HubSource, plan: Plan, folder: Path, progress: Progress
) -> None:
    with progress.task(f"fetching {source.name}", plan.size_bytes) as task:
        meter, done = Meter(task, plan.size_bytes), 0
        for file in plan.files:
            client.download(
                f"/api/v1/models/{source.repo}/repo",
                {"Revision": plan.revision, "FilePath": file.path},
                _growing(file, folder),
                file.size_bytes,
                _teller(meter, done),
            )
            done += file.size_bytes
            meter.reach(done)


def _teller(meter: Meter, done_bytes: int) -> Callable[[int], None]:
    return lambda num_bytes: meter.reach(done_bytes + num_bytes)


def _install(source: HubSource, plan: Plan, shelf: Shelf, progress: Progress) -> LocalModel:
    """Verify each file, give it its name, and make the whole the shelf's."""
    checksums = {}
    with progress.task(f"checking {source.name}", plan.size_bytes) as task:
        for file in plan.files:
            path = _growing(file, shelf.partial)
            checksums[file] = sha256 = hash_file(path, task)
            if file.sha256 not in (None, sha256):
                path.unlink()
                raise ModelFileError(
                    f"{file.path} of {source.place} has the wrong checksum ({sha256}, not "
                    f"{file.sha256}) and was thrown away: `tokenmill pull {source.name}` again"
                )
    records = []
    for file, sha256 in checksums.items():
        with storage_errors(shelf.partial):
            _growing(file, shelf.partial).rename(shelf.partial / file.name)
        records.append(record_file(shelf.partial, file.name, sha256))
    place = shelf.partial / plan.files[0].name if source.file else shelf.partial
    model = open_local(place, source.name)
    return shelf.install(Receipt(spec=source.spec, model=model, files=tuple(records)))

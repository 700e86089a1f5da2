"""Models that lie on disk: look at a file or a folder and say what it holds.

Only GGUF and safetensors are ever opened. Pickled weights run code when they are read, so
they are refused by name.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenmill.errors import ModelFileError, UnsupportedModelError, UsageError

GGUF_MAGIC = b"GGUF"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class LocalModel:
    """A model on disk: a `.gguf` file, or a folder of safetensors with its config.json."""

    name: str
    path: Path
    kind: Literal["gguf", "safetensors"]


def open_local(path: Path, name: str) -> LocalModel:
    """Say what lies at an existing `path`.

    Raises UnsupportedModelError for pickled and other formats, ModelFileError for a damaged or
    incomplete model, UsageError where a folder holds more than one model.
    """
    if path.is_dir():
        return _open_folder(path, name)
    if path.suffix == ".safetensors":
        raise UsageError(f"{path}: give the folder that holds it and its config.json")
    if path.name.endswith(PICKLED_SUFFIXES):
        raise pickled_error(str(path))
    check_gguf_magic(path)
    return LocalModel(name=name, path=path, kind="gguf")


def pickled_error(place: str) -> UnsupportedModelError:
    """The refusal of a model that has only pickled weights."""
    return UnsupportedModelError(
        f"{place} has pickled weights ({', '.join(PICKLED_SUFFIXES)}), which can run code when "
        "read and are never opened: use a safetensors or GGUF version of the model"
    )


def check_gguf_magic(path: Path) -> None:
    """Raise unless the file begins as GGUF files do."""
    try:
        with open(path, "rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}") from error
    if magic != GGUF_MAGIC:
        found = f"it begins with {magic!r}" if magic else "it is empty"
        raise ModelFileError(f"{path} is not a GGUF file ({found})")


def choose_safetensors(names: list[str]) -> list[str]:
    """The weights among a folder's file names, without a second copy in another layout.

    Several are shards, which need an index.
    """
    if SINGLE in names and INDEX not in names:
        return [SINGLE]
    weights = [name for name in names if name.endswith(".safetensors")]
    return [name for name in weights if name.startswith("model")] or weights


def choose_gguf(names: list[str], place: str) -> str | None:
    """The one GGUF file among names, or None; UsageError where there are several."""
    files = sorted(name for name in names if name.endswith(".gguf"))
    if len(files) > 1:
        shown = ", ".join(files[:8]) + (", ..." if len(files) > 8 else "")
        raise UsageError(f"{place} has {len(files)} GGUF files: name one of {shown}")
    return files[0] if files else None


def _open_folder(folder: Path, name: str) -> LocalModel:
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError as error:
        raise UsageError(f"cannot read folder {folder}: {error.strerror}") from error
    if choose_safetensors(names):
        _check_safetensors_folder(folder, names)
        return LocalModel(name=name, path=folder, kind="safetensors")
    if gguf := choose_gguf(names, str(folder)):
        return open_local(folder / gguf, name)
    if any(entry.endswith(PICKLED_SUFFIXES) for entry in names):
        raise pickled_error(str(folder))
    raise UnsupportedModelError(f"{folder} holds neither .safetensors nor .gguf weights")


def _check_safetensors_folder(folder: Path, names: list[str]) -> None:
    if "config.json" not in names:
        raise ModelFileError(f"{folder} has safetensors weights but no config.json")
    if INDEX not in names:
        return
    missing = sorted(_indexed_shards(folder / INDEX) - set(names))
    if missing:
        raise ModelFileError(
            f"{folder} is incomplete: {len(missing)} of the files in {INDEX} are missing, "
            f"first {missing[0]!r}"
        )


def _indexed_shards(index: Path) -> set[str]:
    try:
        shards = json.loads(index.read_bytes())["weight_map"].values()
        return {str(shard) for shard in shards}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(f"{index} is not an index of safetensors files") from error

"""Which files of a repository on a hub make a model."""

import fnmatch

from tokenmill.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from tokenmill.models.sources.local import (
    PICKLED_SUFFIXES,
    choose_gguf,
    choose_safetensors,
    pickled_error,
)
from tokenmill.models.sources.spec import HubSource

COMPANIONS = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model")
"""What is fetched beside safetensors weights."""


def choose_files(source: HubSource, names: list[str]) -> list[str]:
    """Which files of a repository to fetch.

    Raises UnsupportedModelError where none can be used, ModelFileError where one is missing,
    ModelNotFoundError where the selected file does not exist, UsageError where a choice is left
    to the user.
    """
    place = source.place
    if source.file:
        if source.file not in names:
            raise ModelNotFoundError(f"{place} has no file {source.file!r}")
        return [source.file]
    names = [name for name in names if "/" not in name]
    if weights := choose_safetensors(names):
        if "config.json" not in names:
            raise ModelFileError(f"{place} has safetensors weights but no config.json")
        return weights + [name for name in names if _is_companion(name)]
    if gguf := choose_gguf(names, place):
        return [gguf]
    if any(name.endswith(PICKLED_SUFFIXES) for name in names):
        raise pickled_error(place)
    raise UnsupportedModelError(f"{place} holds neither .safetensors nor .gguf weights")


def _is_companion(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANIONS)

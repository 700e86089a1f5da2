"""Safetensors folders: one file, or shards with an index; the weights left where they lie.

The `safetensors` library proves that a file's header is sound (in bounds, no overlap, no
hole); the offsets are then read from it, because the library would copy what it hands out.
"""

import json
import re
from pathlib import Path

import numpy as np

from tokenmill.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from tokenmill.models.mapped import MappedTensor, TensorInfo, map_file
from tokenmill.models.sources.local import INDEX, choose_safetensors

_SHARD_NAME = re.compile(r"[^/\\\0]+\.safetensors")


def read_safetensors(folder: Path) -> dict[str, MappedTensor]:
    """Parse the headers of a folder's safetensors files; tensors by their name in the files.

    Raises ModelFileError for files that are damaged, missing or not what the index says.
    """
    index = folder / INDEX
    if not index.is_file():
        return read_safetensors_file(_single_file(folder))
    weight_map = _read_weight_map(index)
    shards = {
        name: read_safetensors_file(folder / name) for name in sorted(set(weight_map.values()))
    }
    tensors: dict[str, MappedTensor] = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise ModelFileError(f"{folder / shard}: lacks {name!r}, which {INDEX} puts there")
        tensors[name] = shards[shard][name]
    return tensors


def safetensors_paths(folder: Path) -> list[Path]:
    """The files that hold the folder's weights, the index included."""
    index = folder / INDEX
    if not index.is_file():
        return [_single_file(folder)]
    return [index, *(folder / name for name in sorted(set(_read_weight_map(index).values())))]


def _single_file(folder: Path) -> Path:
    files = choose_safetensors(sorted(path.name for path in folder.glob("*.safetensors")))
    if len(files) == 1:
        return folder / files[0]
    if files:
        raise ModelFileError(f"{folder}: has {len(files)} .safetensors files but no {INDEX}")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise UnsupportedModelError(
            f"{folder}: has pickled weights only, which may run code when they are read; "
            "supported are safetensors and GGUF"
        )
    raise ModelNotFoundError(f"{folder}: has no .safetensors and no .gguf file")


def _read_weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{index}: weight_map is missing or empty")
    for shard in weight_map.values():
        # The name of a file beside the index; anything with a folder in it could lead elsewhere.
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise ModelFileError(f"{index}: {shard!r} does not name a .safetensors file beside it")
    return weight_map


def read_json(path: Path) -> dict[str, object]:
    """A file that holds one JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file; fetch the model again") from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelFileError(f"{path}: holds no JSON object")
    return content


def read_safetensors_file(path: Path) -> dict[str, MappedTensor]:
    data = map_file(path)
    _validate(path)
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    file_bytes = np.frombuffer(data, np.uint8)
    tensors: dict[str, MappedTensor] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            info = TensorInfo(
                shape=tuple(entry["shape"]), encoding=entry["dtype"], size_bytes=stop - start
            )
            tensors[name] = MappedTensor(
                info=info, file_bytes=file_bytes, start=8 + header_bytes + start
            )
    return tensors


def _validate(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return
    except SafetensorError as error:
        problem = " ".join(str(error).split())
        raise ModelFileError(f"{path}: {problem}; fetch the file again") from None

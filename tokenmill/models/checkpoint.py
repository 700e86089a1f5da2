"""A model on disk under canonical names, whatever the kind of its files.

Canonical names are those of `architecture.py`. A tensor that the architecture does not know keeps
the name that it has in its file.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from tokenmill.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from tokenmill.ir.order import F32Array
from tokenmill.models.architecture import (
    GGUF_LAYER_PREFIX,
    HF_MODEL_PREFIX,
    LAYER_NAMES,
    MODEL_NAMES,
    Architecture,
)
from tokenmill.models.config import ModelConfig
from tokenmill.models.gguf.reader import MetadataValue, read_gguf, split_paths
from tokenmill.models.mapped import (
    EncodedTensor,
    FileTensor,
    MappedTensor,
    Tensor,
    TensorInfo,
)
from tokenmill.models.quantized import OLD_FILES, notes_on_quantization, unpack_quantized
from tokenmill.models.read_config import ROPE_DIVISORS, config_from_gguf, config_from_hf
from tokenmill.models.rearrange import IndexArray, cut_apart, shifted, stack_experts, turned_halves
from tokenmill.models.registry import ARCHITECTURES
from tokenmill.models.safetensors import read_json, read_safetensors, safetensors_paths

_HF, _GGUF = 0, 1  # columns of the tables of names
_HEAD = "lm_head."


class Checkpoint(Protocol):
    """Where a model's config and weights come from."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by canonical name."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should be told: where the files ask for what is done in another way."""
        ...

    @property
    def tokenizer_metadata(self) -> Mapping[str, MetadataValue] | None:
        """The metadata of a GGUF file, keys as in the file; None for a folder."""
        ...

    def read(self, name: str) -> EncodedTensor:
        """The bytes of a tensor by canonical name."""
        ...

    def name_in_files(self, name: str) -> str:
        """What the files call a tensor, by canonical name; for messages."""
        ...

    def fingerprint(self) -> str:
        """Changes when the files do; the same in another folder. See `fingerprint_model`."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class FileCheckpoint:
    """A checkpoint over mapped files."""

    path: Path
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    tokenizer_metadata: Mapping[str, MetadataValue] | None
    _mapped: Mapping[str, Tensor]
    _head_orders: Mapping[str, IndexArray]  # of tensors whose heads have their rows out of order
    _norm_offset: float
    _column: int  # of the tables of names
    notes: tuple[str, ...] = ()

    def read(self, name: str) -> EncodedTensor:
        """The bytes of a tensor, as the architecture wants it: rows in order, norms complete."""
        tensor = self._mapped[name].read(self.name_in_files(name))
        part = name.rpartition(".")[2]
        if part in self._head_orders:
            return self._with_rows(tensor, self._head_orders[part])
        if self._norm_offset and part.endswith("norm"):
            return shifted(tensor, self._norm_offset)
        return tensor

    def _with_rows(self, tensor: EncodedTensor, order: IndexArray) -> EncodedTensor:
        """Every head's rows in another order: whole rows, so nothing is lost."""
        num_rows = tensor.info.shape[0]
        if num_rows % len(order) or tensor.data.size % num_rows:
            raise ModelFileError(
                f"{self.path}: {tensor.name}: {num_rows} rows are no heads of {len(order)}"
            )
        heads = tensor.data.reshape(num_rows // len(order), len(order), -1)
        data = np.ascontiguousarray(heads[:, order]).reshape(tensor.data.shape)
        return EncodedTensor(name=tensor.name, info=tensor.info, data=data)

    def name_in_files(self, name: str) -> str:
        """A tensor that the files keep in one with others stays as we call it."""
        architecture = ARCHITECTURES[self.config.architecture]
        layer, _, part = name.removeprefix("layers.").partition(".")
        if name.startswith("layers."):
            prefix = (architecture.hf_layer_prefix, GGUF_LAYER_PREFIX)[self._column]
            theirs = {**LAYER_NAMES, **architecture.layer_names}.get(part)
            found = f"{prefix}{layer}.{theirs[self._column]}" if theirs else None
        else:
            theirs = {**MODEL_NAMES, **architecture.model_names}.get(name)
            found = theirs[self._column] if theirs else None
        return found or name

    def fingerprint(self) -> str:
        return fingerprint_model(self.path)


def open_checkpoint(path: Path) -> FileCheckpoint:
    """Open a `.gguf` file, or a folder with safetensors and config.json or with one GGUF file.

    Reads headers only. Raises ModelNotFoundError, ModelFileError or UnsupportedModelError.
    """
    path = model_path(path)
    return _open_folder(path) if path.is_dir() else _open_gguf(path)


def fingerprint_model(path: Path) -> str:
    """A name for the content of a model's files, for use as a key of caches.

    Made of each file's name, size, time of change and first and last MiB; parses no header.
    """
    path = model_path(path)
    if not path.is_dir():
        return _fingerprint(split_paths(path))
    names = ("config.json", "generation_config.json", *OLD_FILES)
    configs = [path / name for name in names]
    return _fingerprint([p for p in configs if p.is_file()] + safetensors_paths(path))


def model_path(path: Path) -> Path:
    """The GGUF file that a path means, or the folder of safetensors that it is."""
    if path.is_dir():
        return path if any(path.glob("*.safetensors*")) else _gguf_in(path)
    if not path.exists():
        raise ModelNotFoundError(f"{path}: no such file or folder")
    if path.suffix != ".gguf":
        raise UnsupportedModelError(
            f"{path}: is no .gguf file; for safetensors give the folder that holds config.json"
        )
    return path


def _gguf_in(folder: Path) -> Path:
    """The only GGUF file of a folder, or the first part of the only split one."""
    files = sorted(folder.glob("*.gguf"))
    if not files:
        return folder  # whose safetensors will be missed by name
    if len(files) > 1 and split_paths(files[0]) != files:
        raise ModelFileError(f"{folder}: has {len(files)} .gguf files; give one of them")
    return files[0]


def _open_gguf(path: Path) -> FileCheckpoint:
    file = read_gguf(path)
    tensors = {n: t for n, t in file.tensors.items() if n not in ROPE_DIVISORS}
    shapes = {name: tensor.info.shape for name, tensor in tensors.items()}
    divisors = {
        name: _read_floats(path, name, file.tensors[name])
        for name in ROPE_DIVISORS
        if name in file.tensors
    }
    config = config_from_gguf(str(path), file.metadata, shapes, divisors)
    return _checkpoint(path, config, tensors, _GGUF, file.metadata)


def _open_folder(folder: Path) -> FileCheckpoint:
    tensors = _of_whole_model(read_safetensors(folder))
    content = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    config = config_from_hf(
        str(folder),
        folder.resolve().name,
        content,
        read_json(generation) if generation.is_file() else {},
    )
    unpacked = unpack_quantized(folder, content, tensors)
    opened = _checkpoint(folder, config, unpacked, _HF, None)
    return replace(opened, notes=notes_on_quantization(folder, content))


def _checkpoint(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, FileTensor],
    column: int,
    metadata: Mapping[str, MetadataValue] | None,
) -> FileCheckpoint:
    architecture = ARCHITECTURES[config.architecture]
    whole = _without_empty_biases(_canonical(tensors, architecture, column), config)
    mapped = stack_experts(str(path), cut_apart(str(path), whole, config), config)
    if "lm_head" not in mapped and not config.is_tied:
        config = replace(config, has_head=False)
    heads = turned_halves(config)
    if column == _GGUF:
        heads = gguf_head_order(config, architecture.is_interleaved)
    unused = architecture.unused(config)
    is_in_order = bool((np.diff(heads) == 1).all())
    return FileCheckpoint(
        path=path,
        config=config,
        tensors={name: t.info for name, t in mapped.items() if name not in unused},
        tokenizer_metadata=metadata,
        _mapped=mapped,
        _head_orders={} if is_in_order else dict.fromkeys(("q", "k", "q_bias", "k_bias"), heads),
        _norm_offset=architecture.hf_norm_offset if column == _HF else 0.0,
        _column=column,
    )


def gguf_head_order(config: ModelConfig, is_interleaved: bool) -> IndexArray:
    """For each dimension of a head, in our order, the row in which GGUF files have it."""
    rows = np.arange(config.head_dim)
    if is_interleaved:
        rows = rows.reshape(-1, 2).T.reshape(-1)
    return rows[turned_halves(config)]


def _canonical(
    tensors: Mapping[str, FileTensor], architecture: Architecture, column: int
) -> dict[str, FileTensor]:
    """The same tensors under our names."""
    prefix = (architecture.hf_prefix, "")[column]
    layer_prefix = (architecture.hf_layer_prefix, GGUF_LAYER_PREFIX)[column]
    layer_names = {**LAYER_NAMES, **architecture.layer_names}
    model_names = {**MODEL_NAMES, **architecture.model_names}
    own = {theirs[column]: ours for ours, theirs in model_names.items() if theirs[column]}
    own_in_layer = {theirs[column]: ours for ours, theirs in layer_names.items() if theirs[column]}

    def rename(name: str) -> str:
        name = name.removeprefix(prefix)
        index, _, rest = name.removeprefix(layer_prefix).partition(".")
        if name.startswith(layer_prefix) and rest in own_in_layer:
            return f"layers.{index}.{own_in_layer[rest]}"
        return own.get(name, name)

    return {rename(name): tensor for name, tensor in tensors.items()}


def _of_whole_model(tensors: Mapping[str, MappedTensor]) -> Mapping[str, MappedTensor]:
    """A decoder's tensors as if the head had been saved with them: AutoModel saves without it."""
    if "embed_tokens.weight" not in tensors:
        return tensors
    return {
        name if name.startswith(_HEAD) else f"{HF_MODEL_PREFIX}{name}": tensor
        for name, tensor in tensors.items()
    }


def _without_empty_biases(
    tensors: Mapping[str, FileTensor], config: ModelConfig
) -> dict[str, FileTensor]:
    """Without the biases of zeros that AutoGPTQ gives to linears which have none."""

    def is_empty(name: str, tensor: FileTensor) -> bool:
        part = name.rpartition(".")[2]
        is_known = part.endswith("_bias") and config.has_attention_bias
        is_bias = part == "bias" or part in ("q_bias", "k_bias", "v_bias")
        return is_bias and not is_known and not tensor.read(name).data.any()

    return {name: tensor for name, tensor in tensors.items() if not is_empty(name, tensor)}


def _read_floats(path: Path, name: str, tensor: MappedTensor) -> F32Array:
    """A small vector that belongs to the config."""
    if tensor.info.encoding != "F32" or len(tensor.info.shape) != 1:
        raise ModelFileError(f"{path}: {name} is no vector of float32")
    return tensor.read(name).data.reshape(-1).view(np.float32)


def _fingerprint(paths: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    sample_bytes = 2**20
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(file.read(sample_bytes))
                size = file.seek(0, 2)
                file.seek(max(0, size - sample_bytes))
                digest.update(file.read(sample_bytes))
        except OSError as error:
            raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error
        digest.update(repr((path.name, size, path.stat().st_mtime_ns)).encode())
    return digest.hexdigest()

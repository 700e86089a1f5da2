"""A model on disk under canonical names, whatever the kind of its files.

Canonical names: `embed`, `final_norm`, `lm_head` (absent when tied), and for layer i
`layers.{i}.` followed by attn_norm, q, k, v, o, q_bias, k_bias, v_bias, ffn_norm, gate, up, down.
A tensor that no table below knows keeps the name that it has in its file.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from tokenmill.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from tokenmill.models.config import ModelConfig, config_from_gguf, config_from_hf
from tokenmill.models.gguf import MetadataValue, read_gguf, split_paths
from tokenmill.models.mapped import EncodedTensor, MappedTensor, TensorInfo
from tokenmill.models.safetensors import read_json, read_safetensors, safetensors_paths

_GGUF_NAMES = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
}
_GGUF_LAYER_PREFIX = "blk."
_GGUF_LAYER_NAMES = {
    "attn_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "ffn_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}

_HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
_HF_LAYER_PREFIX = "model.layers."
_HF_LAYER_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


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
    def tokenizer_metadata(self) -> Mapping[str, MetadataValue] | None:
        """The metadata of a GGUF file, keys as in the file; None for a folder."""
        ...

    def read(self, name: str) -> EncodedTensor:
        """The bytes of a tensor by canonical name."""
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
    _mapped: Mapping[str, MappedTensor]
    _rotary_heads: Mapping[str, int]  # heads of the tensors whose rows are interleaved

    def read(self, name: str) -> EncodedTensor:
        """The bytes of a tensor; rows that GGUF keeps interleaved are put back in order."""
        tensor = self._mapped[name].read(name)
        heads = self._rotary_heads.get(name.rpartition(".")[2])
        if heads is None:
            return tensor
        num_rows = tensor.info.shape[0]
        if num_rows % (2 * heads) or tensor.data.size % num_rows:
            raise ModelFileError(
                f"{self.path}: {name}: {num_rows} rows are no pairs in {heads} heads"
            )
        return _deinterleave(tensor, heads)

    def fingerprint(self) -> str:
        return fingerprint_model(self.path)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a `.gguf` file, or a folder with safetensors and config.json or with one GGUF file.

    Reads headers only. Raises ModelNotFoundError, ModelFileError or UnsupportedModelError.
    """
    path = _model_path(path)
    return _open_folder(path) if path.is_dir() else _open_gguf(path)


def fingerprint_model(path: Path) -> str:
    """A name for the content of a model's files, for use as a key of caches.

    Made of each file's name, size, time of change and first and last MiB; parses no header.
    """
    path = _model_path(path)
    if not path.is_dir():
        return _fingerprint(split_paths(path))
    configs = [path / name for name in ("config.json", "generation_config.json")]
    return _fingerprint([p for p in configs if p.is_file()] + safetensors_paths(path))


def _model_path(path: Path) -> Path:
    """A GGUF file, or a folder of safetensors."""
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
    shapes = {name: tensor.info.shape for name, tensor in file.tensors.items()}
    config = config_from_gguf(str(path), file.metadata, shapes)
    # llama.cpp rotates neighbouring rows of a llama model, halves of a head in a qwen2 model.
    q, k = config.num_heads, config.num_kv_heads
    heads = {"q": q, "q_bias": q, "k": k, "k_bias": k} if config.architecture == "llama" else {}
    mapped = _canonical(file.tensors, _GGUF_NAMES, _GGUF_LAYER_PREFIX, _GGUF_LAYER_NAMES)
    return _checkpoint(path, config, mapped, heads, file.metadata)


def _open_folder(folder: Path) -> FileCheckpoint:
    tensors = read_safetensors(folder)
    generation = folder / "generation_config.json"
    config = config_from_hf(
        str(folder),
        folder.resolve().name,
        read_json(folder / "config.json"),
        read_json(generation) if generation.is_file() else {},
    )
    mapped = _canonical(tensors, _HF_NAMES, _HF_LAYER_PREFIX, _HF_LAYER_NAMES)
    return _checkpoint(folder, config, mapped, {}, None)


def _checkpoint(
    path: Path,
    config: ModelConfig,
    mapped: Mapping[str, MappedTensor],
    rotary_heads: Mapping[str, int],
    metadata: Mapping[str, MetadataValue] | None,
) -> FileCheckpoint:
    return FileCheckpoint(
        path=path,
        config=config,
        tensors={name: tensor.info for name, tensor in mapped.items()},
        tokenizer_metadata=metadata,
        _mapped=mapped,
        _rotary_heads=rotary_heads,
    )


def _canonical(
    tensors: Mapping[str, MappedTensor],
    names: Mapping[str, str],
    layer_prefix: str,
    layer_names: Mapping[str, str],
) -> dict[str, MappedTensor]:
    own = {theirs: ours for ours, theirs in names.items()}
    own_in_layer = {theirs: ours for ours, theirs in layer_names.items()}

    def rename(name: str) -> str:
        index, _, rest = name.removeprefix(layer_prefix).partition(".")
        if name.startswith(layer_prefix) and rest in own_in_layer:
            return f"layers.{index}.{own_in_layer[rest]}"
        return own.get(name, name)

    return {rename(name): tensor for name, tensor in tensors.items()}


def _deinterleave(tensor: EncodedTensor, heads: int) -> EncodedTensor:
    """Rows 0, 2, 4 ... of each head, then its rows 1, 3, 5 ...: whole rows, so nothing is lost."""
    rows = tensor.data.reshape(heads, tensor.info.shape[0] // (2 * heads), 2, -1)
    data = np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(tensor.data.shape)
    return EncodedTensor(name=tensor.name, info=tensor.info, data=data)


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

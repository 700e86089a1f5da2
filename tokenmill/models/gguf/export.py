"""A folder of safetensors as the metadata and tensors of a GGUF file.

The way back of `read_config.config_from_gguf` and of the names and orders that `checkpoint.py`
undoes, as llama.cpp's converter has them (github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py).
What was written is read again and compared with the folder's config, so that a model of which
metadata cannot tell something is refused, never written as another one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from math import isclose

import numpy as np

from tokenmill.errors import UnsupportedModelError
from tokenmill.models.architecture import GGUF_LAYER_PREFIX, LAYER_NAMES, MODEL_NAMES
from tokenmill.models.checkpoint import FileCheckpoint, gguf_head_order
from tokenmill.models.config import ModelConfig
from tokenmill.models.gguf.export_config import (
    config_metadata,
    frequency_factors,
    gguf_name,
    read_scaling,
)
from tokenmill.models.gguf.export_tokenizer import tokenizer_metadata
from tokenmill.models.gguf.typed import Typed
from tokenmill.models.mapped import EncodedTensor, TensorInfo
from tokenmill.models.read_config import config_from_gguf
from tokenmill.models.registry import ARCHITECTURES

_HEADS = ("q", "k", "q_bias", "k_bias")
_SAME = 1e-6  # relative: metadata is float32
_SAID_ELSEWHERE = ("name", "architecture", "bos_id", "eos_ids", "num_positions")


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportedTensor:
    """A tensor under its GGUF name; `shape` has a third dimension for experts."""

    name: str
    info: TensorInfo
    shape: tuple[int, ...]
    parts: tuple[str, ...] = ()  # canonical names, one below the other
    content: EncodedTensor | None = None  # of what is in no tensor of the folder

    @property
    def is_exact(self) -> bool:
        """Must it stay in float32, as llama.cpp wants vectors and routers?"""
        return len(self.shape) == 1 or "ffn_gate_inp" in self.name


@dataclass(frozen=True, kw_only=True, eq=False)
class Export:
    """All that a GGUF file says; `tensors` in the order of the file."""

    checkpoint: FileCheckpoint
    architecture: str
    metadata: Mapping[str, Typed]
    tensors: tuple[ExportedTensor, ...]

    def read(self, tensor: ExportedTensor) -> EncodedTensor:
        """A tensor's bytes, rows in the order of GGUF files."""
        if tensor.content is not None:
            return tensor.content
        parts = [self._ordered(name) for name in tensor.parts]
        data = np.concatenate([part.data for part in parts]) if len(parts) > 1 else parts[0].data
        return EncodedTensor(name=tensor.name, info=tensor.info, data=data)

    def _ordered(self, name: str) -> EncodedTensor:
        tensor = self.checkpoint.read(name)
        if name.rpartition(".")[2] not in _HEADS:
            return tensor
        is_interleaved = ARCHITECTURES[self.architecture].is_interleaved
        order = np.argsort(gguf_head_order(self.checkpoint.config, is_interleaved))
        num_rows = tensor.info.shape[0]
        heads = tensor.data.reshape(num_rows // len(order), len(order), -1)
        data = np.ascontiguousarray(heads[:, order]).reshape(tensor.data.shape)
        return replace(tensor, data=data)


def export(checkpoint: FileCheckpoint) -> Export:
    """Raises UnsupportedModelError where a GGUF file cannot say what the folder says."""
    config, scaling = checkpoint.config, read_scaling(checkpoint.path)
    name = gguf_name(config)
    metadata = {
        **config_metadata(name, config, scaling),
        **tokenizer_metadata(checkpoint.path, config),
    }
    factors = frequency_factors(name, config, scaling)
    vectors = (_vector(name, values) for name, values in factors.items())
    tensors = (*vectors, *_tensors(checkpoint))
    _prove(checkpoint, name, metadata, tensors)
    return Export(checkpoint=checkpoint, architecture=name, metadata=metadata, tensors=tensors)


def _vector(name: str, values: np.ndarray) -> ExportedTensor:
    values = np.ascontiguousarray(values, np.float32)
    info = TensorInfo(shape=values.shape, encoding="F32", size_bytes=values.nbytes)
    data = values.view(np.uint8).reshape(1, -1)
    content = EncodedTensor(name=name, info=info, data=data)
    return ExportedTensor(name=name, info=info, shape=values.shape, content=content)


def _tensors(checkpoint: FileCheckpoint) -> Iterator[ExportedTensor]:
    """Every tensor that the model uses, under its GGUF name; those that GGUF merges in one."""
    config = checkpoint.config
    architecture = ARCHITECTURES[config.architecture]
    merged = architecture.merged(config)
    whole_of = {part: whole for whole, parts in merged.items() for part in parts}
    names = {**LAYER_NAMES, **architecture.layer_names}
    for name in checkpoint.tensors:
        if name in MODEL_NAMES:
            if not (name == "lm_head" and config.is_tied):
                yield _tensor(checkpoint, MODEL_NAMES[name][1], (name,))
            continue
        layer, _, part = name.removeprefix("layers.").partition(".")
        if not name.startswith("layers.") or part not in (*names, *whole_of):
            continue  # refused or ignored where the weights are read
        parts: tuple[str, ...] = (name,)
        if (whole := whole_of.get(part)) is not None:
            if part != next(iter(merged[whole])):
                continue
            parts, part = tuple(f"layers.{layer}.{own}" for own in merged[whole]), whole
        yield _tensor(checkpoint, f"{GGUF_LAYER_PREFIX}{layer}.{names[part][1]}", parts)


def _tensor(checkpoint: FileCheckpoint, name: str, parts: tuple[str, ...]) -> ExportedTensor:
    infos = [checkpoint.tensors[part] for part in parts]
    rows, experts = sum(info.shape[0] for info in infos), checkpoint.config.experts
    shape: tuple[int, ...] = (rows, *infos[0].shape[1:])
    size_bytes = sum(info.size_bytes for info in infos)
    if len({info.encoding for info in infos}) > 1:
        raise UnsupportedModelError(
            f"{checkpoint.path}: {', '.join(parts)} are encoded differently"
        )
    info = TensorInfo(shape=shape, encoding=infos[0].encoding, size_bytes=size_bytes)
    if experts and "_exps." in name:
        shape = (experts.count, rows // experts.count, *shape[1:])
    return ExportedTensor(name=name, info=info, shape=shape, parts=parts)


def _prove(
    checkpoint: FileCheckpoint,
    name: str,
    metadata: Mapping[str, Typed],
    tensors: tuple[ExportedTensor, ...],
) -> None:
    """Read what shall be written as a GGUF file is read, and compare."""
    values: dict[str, object] = {key: value for key, (_, value) in metadata.items()}
    shapes = {t.name: t.info.shape for t in tensors}
    factors = {t.name: t.content.data.reshape(-1) for t in tensors if t.content is not None}
    divisors = {name: data.view(np.float32) for name, data in factors.items()}
    found = config_from_gguf(
        str(checkpoint.path), {**values, "general.architecture": name}, shapes, divisors
    )
    if difference := _difference(_spelled_out(checkpoint.config), _spelled_out(found)):
        raise UnsupportedModelError(
            f"{checkpoint.path}: a GGUF file cannot tell {difference} of a "
            f"{checkpoint.config.architecture} model as this one has it; llama.cpp would compute "
            "something else"
        )


def _spelled_out(config: ModelConfig) -> ModelConfig:
    """Without defaults that mean the same as what another reader finds."""
    return replace(config, attention_scale=config.score_scale)


def _difference(wanted: object, found: object, name: str = "") -> str:
    """The first field in which two configs differ; "" where they are alike."""
    if is_dataclass(wanted) and type(wanted) is type(found):
        pairs = [
            (getattr(wanted, f.name), getattr(found, f.name), f.name)
            for f in fields(wanted)
            if f.name not in _SAID_ELSEWHERE
        ]
    elif isinstance(wanted, tuple) and isinstance(found, tuple) and len(wanted) == len(found):
        pairs = [(a, b, name) for a, b in zip(wanted, found, strict=True)]
    elif isinstance(wanted, float | int) and isinstance(found, float | int):
        return "" if isclose(wanted, found, rel_tol=_SAME) else name
    else:
        return "" if wanted == found else name
    return next((d for a, b, n in pairs if (d := _difference(a, b, n))), "")

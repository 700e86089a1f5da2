"""LoRA adapters (Hu et al. 2021) as PEFT saves them: a folder with a config and safetensors.

An adapter changes linears of the layers. Tensors are found under the names that Hugging Face's
model has for them; what its files keep in one is cut apart, and rows are put in order, as they are
in the model's own weights.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from tokenmill.errors import (
    ModelFileError,
    ModelNotFoundError,
    TokenmillError,
    UnsupportedModelError,
    UsageError,
)
from tokenmill.ir.low_rank import LowRank
from tokenmill.ir.order import F32Array
from tokenmill.models.architecture import HF_LAYER_PREFIX, HF_MODEL_PREFIX, LAYER_NAMES
from tokenmill.models.config import ModelConfig
from tokenmill.models.encodings import FLOAT_ENCODINGS
from tokenmill.models.mapped import MappedTensor
from tokenmill.models.peft_config import CONFIG_NAME, PeftConfig, read_peft_config
from tokenmill.models.rearrange import turned_halves
from tokenmill.models.registry import ARCHITECTURES
from tokenmill.models.safetensors import read_json, read_safetensors_file
from tokenmill.models.weights import decode

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""The weights of a layer that adapters may change, by their canonical names."""

WEIGHTS_NAME = "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_TURNED = ("q", "k")


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """An adapter in memory; one that is loaded again is another one."""

    name: str
    path: str
    digest: bytes  # of its content: adapters of one content change a model alike
    rank: int  # the largest of its ranks
    changes: Mapping[str, LowRank]  # by the full name of the weight, scaled

    @property
    def size_bytes(self) -> int:
        return sum(c.down_RK.nbytes + c.up_NR.nbytes for c in self.changes.values())


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A weight of ours, and the rows that it takes of a module's outputs."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class AdapterReader:
    """Reads adapters for one model. `sizes`: outputs and inputs of every weight with room."""

    config: ModelConfig
    sizes: Mapping[str, tuple[int, int]]
    max_rank: int

    def read(self, name: str, path: Path) -> Adapter:
        """Read a folder. Raises the TokenmillError that names the key or the tensor."""
        folder = _folder(path)
        where = f"adapter {name}: {folder / CONFIG_NAME}"
        config = read_peft_config(where, read_json(folder / CONFIG_NAME))
        self._check_targets(config)
        tensors = _tensors(folder)
        changes = dict(self._changes(config, f"adapter {name}: {folder / WEIGHTS_NAME}", tensors))
        return Adapter(
            name=name,
            path=str(path),
            digest=_digest(changes),
            rank=max(len(change.down_RK) for change in changes.values()),
            changes=changes,
        )

    @cached_property
    def modules(self) -> dict[str, tuple[int, list[_Part]]]:
        """By name in Hugging Face's model: the layer, and the weights that a module holds."""
        architecture = ARCHITECTURES[self.config.architecture]
        merged = architecture.merged(self.config)
        names = {**LAYER_NAMES, **architecture.layer_names}
        in_others = {part for parts in merged.values() for part in parts}
        found: dict[str, tuple[int, list[_Part]]] = {}
        for layer in range(self.config.num_layers):
            for own, (theirs, _) in names.items():
                rows = merged.get(own) or {own: self.sizes.get(f"layers.{layer}.{own}", (0, 0))[0]}
                parts = list(_parts(layer, rows))
                if own not in in_others and all(part.name in self.sizes for part in parts):
                    module = f"{HF_LAYER_PREFIX}{layer}.{theirs.removesuffix('.weight')}"
                    found[module] = (layer, parts)
        return found

    @property
    def _supported(self) -> str:
        return ", ".join(dict.fromkeys(module.rpartition(".")[2] for module in self.modules))

    def _check_targets(self, config: PeftConfig) -> None:
        for target in config.targets or ():
            if not any(m == target or m.endswith(f".{target}") for m in self.modules):
                raise UnsupportedModelError(
                    f"{config.where}: target_modules holds {target!r}, supported are "
                    f"{self._supported}"
                )

    def _changes(
        self, config: PeftConfig, where: str, tensors: Mapping[str, MappedTensor]
    ) -> Iterator[tuple[str, LowRank]]:
        """Every weight that the adapter changes, in the model's order."""
        found = self._by_module(where, tensors)
        for module, (layer, parts) in self.modules.items():
            if module not in found and not config.expects(module, layer):
                continue
            pair = found.get(module, {})
            for factor in "AB":
                if factor not in pair:
                    raise ModelFileError(f"{where}: tensor {_name(module, factor)} is missing")
            change = self._change(config, where, module, parts, pair)
            for part in parts:
                up = np.ascontiguousarray(change.up_NR[part.start : part.stop])
                yield part.name, LowRank(down_RK=change.down_RK, up_NR=self._in_order(part, up))

    def _by_module(
        self, where: str, tensors: Mapping[str, MappedTensor]
    ) -> dict[str, dict[str, MappedTensor]]:
        """The two factors of each module; UnsupportedModelError for any other tensor."""
        found: dict[str, dict[str, MappedTensor]] = {}
        for name, tensor in tensors.items():
            match = _TENSOR.fullmatch(name)
            if match is None or (module := self._whole_name(match[1])) not in self.modules:
                raise UnsupportedModelError(
                    f"{where}: tensor {name!r} changes what adapters cannot change here; supported "
                    f"are lora_A.weight and lora_B.weight of {self._supported} in layers 0 to "
                    f"{self.config.num_layers - 1}"
                )
            found.setdefault(module, {})[match[2]] = tensor
        if not found:
            raise ModelFileError(f"{where}: holds no tensor")
        return found

    def _whole_name(self, module: str) -> str:
        """A module's name in the model with its head; adapters of AutoModel name it without."""
        is_bare = module.startswith(HF_LAYER_PREFIX.removeprefix(HF_MODEL_PREFIX))
        return f"{HF_MODEL_PREFIX}{module}" if is_bare else module

    def _change(
        self,
        config: PeftConfig,
        where: str,
        module: str,
        parts: list[_Part],
        pair: Mapping[str, MappedTensor],
    ) -> LowRank:
        """Both factors of a module in float32, B scaled."""
        rank = config.rank_of(module)
        if rank > self.max_rank:
            raise UsageError(
                f"{where}: {module} has rank {rank}, but max_lora_rank is {self.max_rank}: raise it"
            )
        shapes = {"A": (rank, self.sizes[parts[0].name][1]), "B": (parts[-1].stop, rank)}
        down, up = (_floats(where, _name(module, f), pair[f], shapes[f]) for f in "AB")
        with np.errstate(over="ignore"):
            up = up * np.float32(config.scale_of(module))
        if not np.isfinite(up).all():
            raise ModelFileError(f"{where}: tensor {_name(module, 'B')} is too large once scaled")
        return LowRank(down_RK=down, up_NR=up)

    def _in_order(self, part: _Part, up_NR: F32Array) -> F32Array:
        """Rows of q and k as the model has them; see rearrange.py."""
        order = turned_halves(self.config)
        if part.name.rpartition(".")[2] not in _TURNED or (np.diff(order) == 1).all():
            return up_NR
        heads = up_NR.reshape(-1, len(order), up_NR.shape[1])
        return np.ascontiguousarray(heads[:, order]).reshape(up_NR.shape)


def adapter_rank(path: Path) -> int:
    """The largest rank in an adapter's config. Raises as `AdapterReader.read` does."""
    config = _folder(path) / CONFIG_NAME
    return read_peft_config(f"adapter {path}: {CONFIG_NAME}", read_json(config)).max_rank


def _folder(path: Path) -> Path:
    """The folder of an adapter, of which the weights may be given as well."""
    folder = path.parent if path.name == WEIGHTS_NAME else path
    try:
        if folder.is_dir():
            return folder
    except OSError as error:
        raise ModelNotFoundError(f"{path}: cannot be read: {error.strerror}") from error
    raise ModelNotFoundError(f"{path}: no such folder; give one with {CONFIG_NAME}")


def _tensors(folder: Path) -> Mapping[str, MappedTensor]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        if any(folder.glob("adapter_model.*")):
            raise UnsupportedModelError(
                f"{folder}: has no {WEIGHTS_NAME}; other files may be pickles, which may run code "
                "when they are read: save the adapter as safetensors"
            )
        raise ModelFileError(f"{folder}: has no {WEIGHTS_NAME}")
    return read_safetensors_file(path)


def _parts(layer: int, rows: Mapping[str, int]) -> Iterator[_Part]:
    start = 0
    for own, count in rows.items():
        yield _Part(name=f"layers.{layer}.{own}", start=start, stop=start + count)
        start += count


def _name(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"


def _floats(where: str, name: str, tensor: MappedTensor, shape: tuple[int, ...]) -> F32Array:
    """A tensor of this shape, in float32."""
    info = tensor.info
    if info.shape != shape:
        raise ModelFileError(
            f"{where}: tensor {name} has shape {list(info.shape)}, expected {list(shape)}"
        )
    if info.encoding not in FLOAT_ENCODINGS:
        raise UnsupportedModelError(
            f"{where}: tensor {name} is encoded as {info.encoding}, supported are "
            f"{', '.join(FLOAT_ENCODINGS)}"
        )
    try:
        quants = decode(tensor.read(name), "f32")[0].quants
    except TokenmillError as error:
        raise ModelFileError(f"{where}: {error}") from None
    return np.ascontiguousarray(quants, np.float32)


def _digest(changes: Mapping[str, LowRank]) -> bytes:
    """Of names, shapes and numbers: what files are called and how they are encoded is no matter."""
    digest = hashlib.sha256()
    for name, change in changes.items():
        for factor in (change.down_RK, change.up_NR):
            digest.update(f"{name} {factor.shape}\0".encode())
            digest.update(factor.data)
    return digest.digest()

"""What files do differently: tensors in one or in many, rows in another order, norms less 1.

Everything here is exact, and works on whole rows of encoded weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import numpy as np
import numpy.typing as npt

from tokenmill.errors import ModelFileError
from tokenmill.models.architecture import HF_LAYER_PREFIX
from tokenmill.models.config import ModelConfig
from tokenmill.models.encodings import FLOAT_ENCODINGS
from tokenmill.models.mapped import (
    EncodedTensor,
    FileTensor,
    MappedTensor,
    StackedTensor,
    Tensor,
    TensorInfo,
)
from tokenmill.models.registry import ARCHITECTURES

IndexArray = npt.NDArray[np.intp]


def turned_halves(config: ModelConfig) -> IndexArray:
    """The order of a head's dimensions in which those that turn together lie half a head apart.

    in files  [ turn, first half | turn, second half | still .............. ]
    ours      [ turn, first half | still ... | turn, second half | still ... ]
    """
    half, rest = config.rotary_dim // 2, (config.head_dim - config.rotary_dim) // 2
    parts = np.split(np.arange(config.head_dim), np.cumsum([half, half, rest]))
    return np.concatenate([parts[0], parts[2], parts[1], parts[3]])


def cut_apart(
    where: str, tensors: Mapping[str, FileTensor], config: ModelConfig
) -> dict[str, FileTensor]:
    """Tensors that files keep in one, cut into those that we compute with."""
    merged = ARCHITECTURES[config.architecture].merged(config)
    found: dict[str, FileTensor] = {}
    for name, tensor in tensors.items():
        prefix, _, part = name.rpartition(".")
        if part not in merged:
            found[name] = tensor
            continue
        start, num_rows = 0, sum(merged[part].values())
        if tensor.info.shape[0] != num_rows:
            raise ModelFileError(
                f"{where}: {name} has shape {list(tensor.info.shape)}, expected {num_rows} rows"
            )
        for own, count in merged[part].items():
            found[f"{prefix}.{own}"] = tensor.rows(start, start + count)
            start += count
    return found


def stack_experts(
    where: str, tensors: Mapping[str, FileTensor], config: ModelConfig
) -> dict[str, Tensor]:
    """The experts of a layer in one tensor, where files keep each by itself."""
    wanted = ARCHITECTURES[config.architecture].hf_experts
    found: dict[str, Tensor] = {}
    experts: dict[str, dict[int, FileTensor]] = {}
    for name, tensor in tensors.items():
        place = _expert(name, wanted)
        if place is None:
            found[name] = _flat(tensor)
        else:
            experts.setdefault(place[0], {})[place[1]] = tensor
    for name, parts in experts.items():
        assert config.experts is not None
        missing = set(range(config.experts.count)) - parts.keys()
        kinds = {(part.info.shape, part.info.encoding) for part in parts.values()}
        if missing or len(parts) > config.experts.count or len(kinds) > 1:
            raise ModelFileError(
                f"{where}: {name} takes {config.experts.count} experts of one shape and encoding, "
                f"found are {len(parts)} in {len(kinds)}"
            )
        found[name] = StackedTensor(parts=tuple(parts[index] for index in sorted(parts)))
    return found


def _expert(name: str, wanted: Mapping[str, tuple[str, str]]) -> tuple[str, int] | None:
    """The tensor that one expert's belongs to, and the expert's number."""
    layer, _, rest = name.removeprefix(HF_LAYER_PREFIX).partition(".")
    if not name.startswith(HF_LAYER_PREFIX):
        return None
    for own, (before, behind) in wanted.items():
        number = rest.removeprefix(before).removesuffix(behind)
        if rest == f"{before}{number}{behind}" and number.isdecimal():
            return f"layers.{layer}.{own}", int(number)
    return None


def _flat(tensor: FileTensor) -> FileTensor:
    """Matrices that lie one behind the other, as one."""
    *others, k = tensor.info.shape
    if len(others) < 2 or not isinstance(tensor, MappedTensor):
        return tensor
    info = replace(tensor.info, shape=(prod(others), k))
    return replace(tensor, info=info)


def shifted(tensor: EncodedTensor, offset: float) -> EncodedTensor:
    """A vector plus a number, in float32."""
    dtype = FLOAT_ENCODINGS.get(tensor.info.encoding)
    if dtype is None:
        return tensor  # refused where it is decoded
    values = tensor.data.view(dtype).astype(np.float32) + np.float32(offset)
    info = TensorInfo(shape=tensor.info.shape, encoding="F32", size_bytes=values.nbytes)
    return EncodedTensor(name=tensor.name, info=info, data=values.view(np.uint8))

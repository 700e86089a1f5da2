"""Float8 weights (e4m3) with a scale for the tensor, for each output, or for each block.

A module [N, K] has weight, F8_E4M3 [N, K], and weight_scale_inv (DeepSeek, Qwen) or weight_scale:
one number, [N] or [N, 1], or one for each block of e.g. 128 x 128. Both names hold what the stored
weight is multiplied by. What concerns activations is left out: they keep our formats.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
import numpy.typing as npt

from tokenmill.models.fields import Fields
from tokenmill.models.mapped import FileTensor, MappedTensor, U8Array, UnpackedTensor
from tokenmill.models.quantized.float8 import FLOAT8, RUN, to_bytes
from tokenmill.models.quantized.module import SCALE_DTYPES, Module, Shape, find_modules

_SCALES = ("weight_scale_inv", "weight_scale")
_LEFT_OUT = ("input_scale", "activation_scale", "input_scale_ub", "k_scale", "v_scale")

F32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Fp8:
    """What quantization_config says: rows and columns of a block, or None."""

    block: tuple[int, int] | None


def read_config(fields: Fields) -> Fp8:
    fields.require({"fmt": ("e4m3",), "expert_dtype": ("fp8",)})
    return Fp8(block=read_block(fields, "weight_block_size"))


def read_block(fields: Fields, key: str) -> tuple[int, int] | None:
    """Two sizes, or None where there are none."""
    sizes = fields.values.get(key)
    if sizes is None:
        return None
    if not isinstance(sizes, list) or len(sizes) != 2:
        raise fields.wrong(key, sizes, "two sizes")
    rows, columns = (Fields(fields.where, {key: s}).integer(key, most=2**24) for s in sizes)
    return rows, columns


def unpack(
    where: str, config: Fp8, tensors: Mapping[str, MappedTensor]
) -> tuple[dict[str, FileTensor], set[str]]:
    """The weights by name, and the names of the tensors that they are made of or need not."""
    found: dict[str, FileTensor] = {}
    used: set[str] = set()
    for module in find_modules(where, tensors, (*_SCALES, *_LEFT_OUT)):
        used |= {f"{module.name}.{part}" for part in _LEFT_OUT if part in module.parts}
        for scale in _SCALES:
            if scale in module.parts:
                found[f"{module.name}.weight"] = fp8_weight(module, scale, config.block)
                used.add(f"{module.name}.{scale}")
    return found, used


def fp8_weight(module: Module, scale: str, block: tuple[int, int] | None) -> UnpackedTensor:
    """A weight of any of the three kinds of scale, told apart by the scale's shape."""
    n, k = module.shape("weight", ("F8_E4M3",), rank=2)
    covered = _covered(module, scale, block, (n, k))
    if covered[1] % RUN and covered[1] < k:
        unpack, encoding = _values, "fp8 in small blocks"
    else:
        unpack, encoding = _rows, FLOAT8
    return module.weight(
        (n, k), encoding, ("weight", scale), partial(unpack, module, scale, covered)
    )


def _covered(
    module: Module, scale: str, block: tuple[int, int] | None, shape: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    n, k = shape
    shapes: list[Shape] = [(), (1,), (1, 1), (n,), (n, 1)]
    blocks = None if block is None else (-(-n // block[0]), -(-k // block[1]))
    module.require(scale, SCALE_DTYPES, *shapes, *([] if blocks is None else [blocks]))
    found = module.parts[scale].info.shape
    if block is not None and found == blocks:
        return block
    return (n, k) if prod(found) == 1 else (1, k)


def _rows(module: Module, scale: str, covered: tuple[int, int]) -> U8Array:
    numbers = module.read("weight")
    n, k = numbers.shape
    scales = _by_row(module.read_floats(scale), covered[0], n)
    runs = scales.repeat(-(-covered[1] // RUN), axis=1)[:, : -(-k // RUN)]
    return to_bytes(numbers, runs)


def _values(module: Module, scale: str, covered: tuple[int, int]) -> U8Array:
    """Weights in float32, where blocks are narrower than the runs of our format."""
    numbers = module.read("weight")
    n, k = numbers.shape
    scales = _by_row(module.read_floats(scale), covered[0], n)
    values: F32Array = numbers.astype(np.float32)
    values *= scales.repeat(covered[1], axis=1)[:, :k]
    return values.view(np.uint8)


def _by_row(scales: F32Array, rows: int, n: int) -> F32Array:
    """A scale for each block, one after the other -> [N, blocks side by side]."""
    return scales.reshape(-(-n // rows), -1).repeat(rows, axis=0)[:n]

"""Float8 weights (e4m3) with a scale for the tensor, for each output, or for each block.

A module [N, K] has weight, F8_E4M3 [N, K], and weight_scale_inv (DeepSeek, Qwen) or weight_scale:
one number, [N] or [N, 1], or one for each block of e.g. 128 x 128. Both names hold what the stored
weight is multiplied by. What concerns activations is left out: they keep our formats.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from tokenmill.models.fields import Fields
from tokenmill.models.mapped import FileTensor, MappedTensor, U8Array, UnpackedTensor
from tokenmill.models.quantized.module import SCALE_DTYPES, Module, Shape, find_modules

_SCALES = ("weight_scale_inv", "weight_scale")
_LEFT_OUT = ("input_scale", "activation_scale", "input_scale_ub", "k_scale", "v_scale")
_ROWS = 1024  # unpacked at a time, to bound the temporaries


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
    shapes: list[Shape] = [(), (1,), (1, 1), (n,), (n, 1)]
    if block is not None:
        shapes.append((-(-n // block[0]), -(-k // block[1])))
    module.require(scale, SCALE_DTYPES, *shapes)
    return module.weight((n, k), "fp8", ("weight", scale), partial(_values, module, scale, block))


def _values(module: Module, scale: str, block: tuple[int, int] | None) -> U8Array:
    weight, scales = module.read("weight"), module.read_floats(scale)
    n, k = weight.shape
    if block is not None and scales.shape == (-(-n // block[0]), -(-k // block[1])):
        wide = scales.repeat(block[1], axis=1)[:, :k].repeat(block[0], axis=0)[:n]
    elif scales.size == 1:
        wide = np.broadcast_to(scales.reshape(1, 1), (n, 1))
    else:
        wide = scales.reshape(n, 1)
    values = np.empty((n, k), np.float32)
    for start in range(0, n, _ROWS):
        rows = slice(start, start + _ROWS)
        np.multiply(weight[rows].astype(np.float32), wide[rows], out=values[rows])
    return values.view(np.uint8)

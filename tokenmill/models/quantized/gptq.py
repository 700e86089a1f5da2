"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

A module [N, K] has qweight, int32 [K * bits / 32, N], packed along K from the lowest bits up;
scales [G, N]; qzeros, int32 [G, N * bits / 32], packed along N; g_idx [K], each column's group.
The first version of the layout stores zero points less 1 (so that 16 can be meant); `gptq_v2`
stores them as they are. With act-order columns were quantised in the order of their weight, so that
neighbours belong to any group (github.com/AutoGPTQ/AutoGPTQ, nn_modules/qlinear).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from tokenmill.errors import ModelFileError
from tokenmill.models.fields import Fields
from tokenmill.models.mapped import FileTensor, MappedTensor, U8Array, UnpackedTensor
from tokenmill.models.quantized.integers import IntegerRows, by_runs
from tokenmill.models.quantized.module import SCALE_DTYPES, Module, find_modules, unpack_bits

F32Array = npt.NDArray[np.float32]

GROUP_SIZES = "a multiple of 32, or -1"
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """What quantization_config says; `group_size` -1: a whole row."""

    bits: int
    group_size: int
    is_symmetric: bool
    zero_offset: int  # what is added to a stored zero point


def read_config(fields: Fields) -> Gptq:
    fields.require(
        {
            "bits": (4, 8),
            "checkpoint_format": ("gptq", "gptq_v2"),
            "format": ("gptq", "gptq_v2"),
            "pack_dtype": ("int32",),
            "is_marlin_format": (False,),
        }
    )
    _refuse_overrides(fields)
    layout = fields.values.get("checkpoint_format") or fields.values.get("format")
    return Gptq(
        bits=fields.integer("bits", most=8),
        group_size=read_group_size(fields, "group_size"),
        is_symmetric=fields.flag("sym", default=True),
        zero_offset=0 if layout == "gptq_v2" else 1,
    )


def read_group_size(fields: Fields, key: str) -> int:
    size = fields.integer(key, most=2**24, least=-1, default=-1)
    if size != -1 and (size % 32 or size == 0):
        raise fields.unsupported(key, size, GROUP_SIZES)
    return size


def _refuse_overrides(fields: Fields) -> None:
    """`dynamic` may leave modules out, which one sees; other sizes for some are not supported."""
    overrides = fields.values.get("dynamic") or {}
    if not isinstance(overrides, Mapping):
        raise fields.wrong("dynamic", overrides, "an object")
    for pattern, changes in overrides.items():
        if changes and not str(pattern).startswith("-"):
            raise fields.unsupported(f"dynamic[{pattern!r}]", changes, "leaving modules out ('-:')")


def unpack(
    where: str, config: Gptq, tensors: Mapping[str, MappedTensor]
) -> tuple[dict[str, FileTensor], set[str]]:
    """The weights by name, and the names of the tensors that they are made of."""
    found: dict[str, FileTensor] = {}
    used: set[str] = set()
    for module in find_modules(where, tensors, ("qweight",)):
        found[f"{module.name}.weight"] = _weight(module, config)
        used |= {f"{module.name}.{part}" for part in _PARTS if part in module.parts}
    return found, used


def _weight(module: Module, config: Gptq) -> UnpackedTensor:
    per_word = 32 // config.bits
    rows, n = module.shape("qweight", ("I32",), rank=2)
    k = rows * per_word
    size = k if config.group_size == -1 else config.group_size
    num_groups = -(-k // size)
    module.require("scales", SCALE_DTYPES, (num_groups, n))
    module.require("qzeros", ("I32",), (num_groups, -(-n // per_word)))
    groups = module.column_groups("g_idx", k, num_groups)
    is_ordered = groups is None or bool((groups == np.arange(k) // size).all())
    kind = f"int{config.bits}"
    if not is_ordered:
        kind += " in act-order"
    elif not config.is_symmetric:
        kind += " with zero points"
    make = partial(_rows, module, config, size) if is_ordered else partial(_values, module, config)
    return module.weight((n, k), kind, _PARTS, make)


def _rows(module: Module, config: Gptq, size: int) -> U8Array:
    integers, scales, zeros = _parts(module, config)
    k = integers.shape[1]
    return IntegerRows(
        integers=integers,
        scales=by_runs(np.ascontiguousarray(scales.T), size, k),
        zeros=by_runs(np.ascontiguousarray(zeros.T), size, k),
    ).to_bytes()


def _values(module: Module, config: Gptq) -> U8Array:
    """Weights in float32, where neighbours in a row belong to different groups."""
    integers, scales, zeros = _parts(module, config)
    groups = module.read("g_idx").astype(np.int64)
    values = (integers.T - zeros[groups]) * scales[groups]
    return np.ascontiguousarray(values.T, dtype=np.float32).view(np.uint8)


def _parts(module: Module, config: Gptq) -> tuple[U8Array, F32Array, F32Array]:
    """Integers [N, K]; scales and zero points [G, N]."""
    words = unpack_bits(module.read("qweight"), config.bits)
    n = words.shape[1]
    integers = words.transpose(1, 0, 2).reshape(n, -1)
    stored = unpack_bits(module.read("qzeros"), config.bits)
    zeros = stored.reshape(len(stored), -1)[:, :n].astype(np.float32) + config.zero_offset
    middle = 2 ** (config.bits - 1)
    if config.is_symmetric and (zeros != middle).any():
        raise ModelFileError(
            f"tensor {module.name}.qzeros has zero points other than {middle}, though its config "
            'says "sym": true; say "sym": false there if they are meant'
        )
    return integers, module.read_floats("scales"), zeros

"""compressed-tensors checkpoints, as llm-compressor writes them.

A module [N, K] has one of

    pack-quantized   weight_packed, int32 [N, K * bits / 32], along K from the lowest bits up;
                     weight_scale [N, G]; weight_zero_point, int32 [N * bits / 32, G], packed along
                     N; weight_shape; with act-order weight_g_idx [K]
    int-quantized    weight, int8 [N, K]; weight_scale [N, 1] or one number; weight_zero_point
    float-quantized  weight, float8 (fp8.py)

Packed integers have half their range added. Sizes are told from the tensors, since modules may
differ in them; what they do not show is checked in the config
(github.com/vllm-project/compressed-tensors, compressors/).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from tokenmill.models.fields import Fields
from tokenmill.models.mapped import FileTensor, MappedTensor, U8Array, UnpackedTensor
from tokenmill.models.quantized.fp8 import fp8_weight, read_block
from tokenmill.models.quantized.gptq import read_group_size
from tokenmill.models.quantized.integers import IntegerRows, by_runs
from tokenmill.models.quantized.module import (
    SCALE_DTYPES,
    Array,
    Module,
    Shape,
    find_modules,
    unpack_bits,
)

F32Array = npt.NDArray[np.float32]

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
_STRATEGIES = ("tensor", "channel", "group", "block")
_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_LEFT_OUT = (
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
    *("q_scale", "k_scale", "v_scale", "q_zero_point", "k_zero_point", "v_zero_point"),
)


@dataclass(frozen=True, kw_only=True)
class CompressedTensors:
    """Sizes of groups (-1: a whole row) and of blocks that modules may have."""

    group_sizes: frozenset[int]
    block: tuple[int, int] | None


def read_config(fields: Fields) -> CompressedTensors:
    fields.require({"format": (*_FORMATS, "mixed-precision")})
    for key in ("sparsity_config", "transform_config"):
        inner = fields.values.get(key) or {}
        if not isinstance(inner, Mapping):
            raise fields.wrong(key, inner, "an object")
        if inner.get("format", "dense") != "dense" or inner.get("config_groups"):
            raise fields.unsupported(key, inner, "absence")
    sizes: set[int] = set()
    block = None
    for weights in _weight_schemes(fields):
        weights.require({"num_bits": (4, 8), "type": ("int", "float"), "strategy": _STRATEGIES})
        if weights.values.get("type") == "float":
            weights.require({"num_bits": (8,)})
        sizes.add(read_group_size(weights, "group_size"))
        block = read_block(weights, "block_structure") or block
    return CompressedTensors(group_sizes=frozenset(sizes), block=block)


def _weight_schemes(fields: Fields) -> Iterator[Fields]:
    groups = fields.values.get("config_groups")
    if not isinstance(groups, Mapping):
        raise fields.wrong("config_groups", groups, "an object")
    for name, group in groups.items():
        where = f"{fields.where}.config_groups.{name}"
        if not isinstance(group, Mapping):
            raise fields.wrong(f"config_groups.{name}", group, "an object")
        Fields(where, group).require({"format": _FORMATS})
        weights = group.get("weights")
        if isinstance(weights, Mapping):
            yield Fields(f"{where}.weights", weights)


def unpack(
    where: str, config: CompressedTensors, tensors: Mapping[str, MappedTensor]
) -> tuple[dict[str, FileTensor], set[str]]:
    """The weights by name, and the names of the tensors that they are made of or need not."""
    found: dict[str, FileTensor] = {}
    used: set[str] = set()
    for module in find_modules(where, tensors, ("weight_packed", "weight_scale", *_LEFT_OUT)):
        left_out = (part for part in (*_PARTS, *_LEFT_OUT) if part in module.parts)
        used |= {f"{module.name}.{part}" for part in left_out}
        if "weight_packed" in module.parts or "weight_scale" in module.parts:
            found[f"{module.name}.weight"] = _weight(module, config)
    return found, used


def _weight(module: Module, config: CompressedTensors) -> UnpackedTensor:
    if "weight_packed" in module.parts:
        return _packed(module, config)
    module.shape("weight", ("I8", "F8_E4M3"), rank=2)
    if module.parts["weight"].info.encoding == "F8_E4M3":
        return fp8_weight(module, "weight_scale", config.block)
    return _whole(module)


def _whole(module: Module) -> UnpackedTensor:
    """int8, a scale for each output or for all."""
    n, k = module.shape("weight", ("I8",), rank=2)
    shapes: list[Shape] = [(), (1,), (1, 1), (n,), (n, 1)]
    module.require("weight_scale", SCALE_DTYPES, *shapes)
    has_zeros = "weight_zero_point" in module.parts
    if has_zeros:
        module.require("weight_zero_point", ("I8",), *shapes)

    def rows() -> U8Array:
        zeros = _wide(module.read_floats("weight_zero_point"), n) if has_zeros else 0.0
        scales = by_runs(_wide(module.read_floats("weight_scale"), n), k, k)
        return IntegerRows(
            integers=module.read("weight").view(np.uint8) ^ np.uint8(128),
            scales=scales,
            zeros=np.broadcast_to(np.float32(128) + zeros, scales.shape),
        ).to_bytes()

    kind = "int8 with zero points" if has_zeros else "int8"
    return module.weight((n, k), kind, ("weight", *_PARTS), rows)


def _wide(numbers: F32Array, n: int) -> F32Array:
    """A number, or one for each row, as [N, 1]."""
    return np.broadcast_to(numbers.reshape(-1, 1), (n, 1))


def _packed(module: Module, config: CompressedTensors) -> UnpackedTensor:
    n, num_words = module.shape("weight_packed", ("I32",), rank=2)
    module.require("weight_shape", ("I64", "I32"), (2,))
    told_n, k = (int(size) for size in module.read("weight_shape"))
    bits = next((b for b in (4, 8) if -(-k * b // 32) == num_words), None)
    if bits is None or told_n != n:
        raise module.wrong(
            "weight_packed",
            f"has shape {[n, num_words]}",
            f"weight_shape says {[told_n, k]}, which does not fit 4 or 8 bits",
        )
    _, num_groups = module.shape("weight_scale", SCALE_DTYPES, rank=2)
    size = _group_size(module, config, k, num_groups)
    module.require("weight_scale", SCALE_DTYPES, (n, num_groups))
    has_zeros = "weight_zero_point" in module.parts
    if has_zeros:
        module.require("weight_zero_point", ("I32",), (-(-n * bits // 32), num_groups))
    groups = module.column_groups("weight_g_idx", k, num_groups)
    kind = f"int{bits}"
    if groups is not None and (groups != np.arange(k) // size).any():
        make = partial(_values, module, bits, k, groups)
        return module.weight((n, k), f"{kind} in act-order", _PARTS, make)
    kind += " with zero points" if has_zeros else ""
    return module.weight((n, k), kind, _PARTS, partial(_rows, module, bits, k, size))


def _group_size(module: Module, config: CompressedTensors, k: int, num_groups: int) -> int:
    """Which of the sizes in the config a module has."""
    for size in sorted(k if size == -1 else size for size in config.group_sizes):
        if -(-k // size) == num_groups:
            return size
    sizes = sorted(config.group_sizes)
    raise module.wrong(
        "weight_scale", f"has {num_groups} groups for {k} columns", f"group_size says {sizes}"
    )


def _rows(module: Module, bits: int, k: int, size: int) -> U8Array:
    integers, scales, zeros = _parts(module, bits, k)
    return IntegerRows(
        integers=integers, scales=by_runs(scales, size, k), zeros=by_runs(zeros, size, k)
    ).to_bytes()


def _values(module: Module, bits: int, k: int, groups: npt.NDArray[np.integer]) -> U8Array:
    """Weights in float32, where neighbours in a row belong to different groups."""
    integers, scales, zeros = _parts(module, bits, k)
    values = (integers - zeros[:, groups]) * scales[:, groups]
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint8)


def _parts(module: Module, bits: int, k: int) -> tuple[U8Array, F32Array, F32Array]:
    """Integers [N, K]; scales and zero points [N, G]."""
    integers = _unpacked(module.read("weight_packed"), bits)[:, :k]
    scales = module.read_floats("weight_scale")
    zeros = np.full_like(scales, 2 ** (bits - 1))
    if "weight_zero_point" in module.parts:
        words = np.ascontiguousarray(module.read("weight_zero_point").T)
        zeros = _unpacked(words, bits)[:, : len(scales)].T.astype(np.float32)
    return integers, scales, np.ascontiguousarray(zeros)


def _unpacked(words: Array, bits: int) -> npt.NDArray[np.uint8]:
    return unpack_bits(words, bits).reshape(len(words), -1)

"""AWQ checkpoints in the GEMM layout, as AutoAWQ writes them.

A module [N, K] has qweight, int32 [K, N / 8], eight outputs a word; scales [G, N]; and, where there
are zero points, qzeros, int32 [G, N / 8]. The nibbles of a word, from the lowest, are outputs
0 2 4 6 1 3 5 7 (github.com/casper-hansen/AutoAWQ, awq/utils/packing_utils.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from tokenmill.models.fields import Fields
from tokenmill.models.mapped import FileTensor, MappedTensor, U8Array, UnpackedTensor
from tokenmill.models.quantized.gptq import read_group_size
from tokenmill.models.quantized.integers import IntegerRows, by_runs
from tokenmill.models.quantized.module import (
    SCALE_DTYPES,
    Array,
    Module,
    find_modules,
    unpack_bits,
)

_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_MIDDLE = 8  # the zero point where a file has none
_PARTS = ("qweight", "qzeros", "scales")


@dataclass(frozen=True, kw_only=True)
class Awq:
    """What quantization_config says; `group_size` -1: a whole row."""

    group_size: int
    has_zeros: bool


def read_config(fields: Fields) -> Awq:
    version = fields.values.get("version")
    if version is not None and str(version).lower() != "gemm":
        raise fields.unsupported("version", version, "'gemm'")
    fields.require({"bits": (4,), "w_bit": (4,)})
    key = "group_size" if "group_size" in fields.values else "q_group_size"
    return Awq(
        group_size=read_group_size(fields, key), has_zeros=fields.flag("zero_point", default=True)
    )


def unpack(
    where: str, config: Awq, tensors: Mapping[str, MappedTensor]
) -> tuple[dict[str, FileTensor], set[str]]:
    """The weights by name, and the names of the tensors that they are made of."""
    found: dict[str, FileTensor] = {}
    used: set[str] = set()
    for module in find_modules(where, tensors, ("qweight",)):
        found[f"{module.name}.weight"] = _weight(module, config)
        used |= {f"{module.name}.{part}" for part in _PARTS if part in module.parts}
    return found, used


def _weight(module: Module, config: Awq) -> UnpackedTensor:
    k, num_words = module.shape("qweight", ("I32",), rank=2)
    n = 8 * num_words
    size = k if config.group_size == -1 else config.group_size
    num_groups = -(-k // size)
    module.require("scales", SCALE_DTYPES, (num_groups, n))
    has_zeros = config.has_zeros or "qzeros" in module.parts
    if has_zeros:
        module.require("qzeros", ("I32",), (num_groups, num_words))
    kind = "int4 with zero points" if has_zeros else "int4"
    return module.weight((n, k), kind, _PARTS, partial(_rows, module, size, has_zeros))


def _rows(module: Module, size: int, has_zeros: bool) -> U8Array:
    integers = _in_order(module.read("qweight")).T
    scales = np.ascontiguousarray(module.read_floats("scales").T)
    zeros = np.full_like(scales, _MIDDLE)
    if has_zeros:
        zeros = np.ascontiguousarray(_in_order(module.read("qzeros")).T, dtype=np.float32)
    k = integers.shape[1]
    return IntegerRows(
        integers=np.ascontiguousarray(integers),
        scales=by_runs(scales, size, k),
        zeros=by_runs(zeros, size, k),
    ).to_bytes()


def _in_order(words: Array) -> npt.NDArray[np.uint8]:
    """int32 [R, N / 8] -> integers [R, N]."""
    nibbles = unpack_bits(words, 4)
    ordered = np.empty_like(nibbles)
    ordered[..., _ORDER] = nibbles
    return ordered.reshape(len(words), -1)

"""Checkpoints of safetensors that were quantised by others' tools.

A method's file reads what `quantization_config` says, and finds the modules that were quantised by
the names of their tensors; whatever else there is (norms, embeddings, a head that was left out)
stays as it is. Their weights become tensors whose rows are those of `integers.py`, or float32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenmill.errors import UnsupportedModelError
from tokenmill.models.fields import Fields
from tokenmill.models.mapped import FileTensor, MappedTensor
from tokenmill.models.quantized import awq, compressed_tensors, fp8, gptq
from tokenmill.models.quantized.activations import left_out
from tokenmill.models.safetensors import read_json

KEY = "quantization_config"
OLD_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where earlier versions of AutoGPTQ and AutoAWQ kept it, and the method they have in mind."""

Unpacked = tuple[dict[str, FileTensor], set[str]]


@dataclass(frozen=True, kw_only=True)
class Method:
    """How to read a method's config, and how to find and unpack its weights with that."""

    read_config: Callable[[Fields], Any]
    unpack: Callable[[str, Any, Mapping[str, MappedTensor]], Unpacked]


METHODS = {
    "gptq": Method(read_config=gptq.read_config, unpack=gptq.unpack),
    "awq": Method(read_config=awq.read_config, unpack=awq.unpack),
    "compressed-tensors": Method(
        read_config=compressed_tensors.read_config, unpack=compressed_tensors.unpack
    ),
    "fp8": Method(read_config=fp8.read_config, unpack=fp8.unpack),
    "fbgemm_fp8": Method(read_config=fp8.read_config, unpack=fp8.unpack),
}


def unpack_quantized(
    folder: Path, config: Mapping[str, object], tensors: Mapping[str, MappedTensor]
) -> Mapping[str, FileTensor]:
    """A folder's tensors, the quantised weights unpacked; those of a plain folder as they are.

    `config` is config.json. Raises UnsupportedModelError for a method or an option that we do not
    have, ModelFileError for tensors that are missing or do not fit together.
    """
    fields = _quantization(folder, config)
    if fields is None:
        return tensors
    name = fields.text("quant_method")
    if name.startswith("bitsandbytes"):
        raise UnsupportedModelError(
            f"{fields.where}.quant_method is {name!r}: its blocks are made for its own kernels and "
            "are not read here; take the model's original weights, which --quantization q8 or q4 "
            f"makes as small, or one quantised with {' or '.join(METHODS)}"
        )
    if name not in METHODS:
        raise fields.unsupported("quant_method", name, " or ".join(map(repr, METHODS)))
    method = METHODS[name]
    found, used = method.unpack(str(folder), method.read_config(fields), tensors)
    plain = {name: tensor for name, tensor in tensors.items() if name not in used}
    return {**plain, **found}


def notes_on_quantization(folder: Path, config: Mapping[str, object]) -> tuple[str, ...]:
    """What to tell of a folder's quantisation: sentences on what is not done as it says."""
    fields = _quantization(folder, config)
    return () if fields is None else tuple(left_out(fields))


def _quantization(folder: Path, config: Mapping[str, object]) -> Fields | None:
    """What says how the folder is quantised, in config.json or in a file of its own."""
    inner = config.get(KEY)
    if inner is not None:
        if not isinstance(inner, dict):
            raise Fields(str(folder), config).wrong(KEY, inner, "an object")
        if inner.get("load_in_4bit") or inner.get("load_in_8bit"):
            inner = {"quant_method": "bitsandbytes", **inner}
        return Fields(f"{folder}: {KEY}", inner)
    for name, method in OLD_FILES.items():
        if (folder / name).is_file():
            inner = read_json(folder / name)
            return Fields(f"{folder}: {name}", {"quant_method": method, **inner})
    return None

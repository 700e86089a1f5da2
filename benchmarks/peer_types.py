"""Files in any type of ggml, rounded by llama.cpp itself."""

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Peer
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as dequantize_blocks
from rewrite import WIDE, F32Array, dequantize, rewrite

from tokenmill.models.gguf.reader import read_gguf
from tokenmill.models.mapped import EncodedTensor, TensorInfo, U8Array

_LEAST_WIDE_BITS = 6.5
_JOINED = 8  # rows put end to end where one is not a whole number of blocks


def write_in_type(
    peer: Peer,
    source: Path,
    target: Path,
    type_name: str,
    importance: Mapping[str, F32Array],
) -> None:
    """Write `source` with all matrices in a type; up to 6 bits, embedding and head are Q8_0.

    Where rows are not a whole number of blocks, for which llama.cpp would take another type, eight
    of them are rounded end to end, and the file gets what the blocks stand for in float32.
    """
    with tempfile.TemporaryDirectory() as folder:
        encode = partial(_encode, peer, Path(folder), type_name, importance)
        rewrite(source, target, partial(_choose, type_name), encode)


def has_joined_rows(source: Path, type_name: str) -> bool:
    """Does `write_in_type` have to put rows end to end?"""
    infos = {name: tensor.info for name, tensor in read_gguf(source).tensors.items()}
    matrices = {name: info for name, info in infos.items() if len(info.shape) == 2}
    return any(_choose(type_name, name, info) == "F32" for name, info in matrices.items())


def _choose(type_name: str, name: str, info: TensorInfo) -> str | None:
    wanted = _type_of(name, type_name)
    block_len, _ = GGML_QUANT_SIZES[GGMLQuantizationType[wanted]]
    return "F32" if info.shape[1] % block_len else wanted


def _type_of(name: str, type_name: str) -> str:
    return "Q8_0" if name in WIDE and bits_of(type_name) < _LEAST_WIDE_BITS else type_name


def bits_of(type_name: str) -> float:
    """Bits a weight of a type of ggml."""
    block_len, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return 8 * block_bytes / block_len


def _encode(
    peer: Peer,
    folder: Path,
    type_name: str,
    importance: Mapping[str, F32Array],
    tensor: EncodedTensor,
    encoding: str,
) -> U8Array:
    wanted = GGMLQuantizationType[_type_of(tensor.name, type_name)]
    values, _ = dequantize(tensor)
    weights = importance.get(tensor.name)
    if encoding != "F32":
        return quantize(peer, folder, values, wanted, weights)
    joined = values.reshape(len(values) // _JOINED, -1)
    if weights is not None:
        weights = np.tile(weights, _JOINED)
    blocks = quantize(peer, folder, joined, wanted, weights)
    exact: U8Array = dequantize_blocks(blocks, wanted).reshape(values.shape).view(np.uint8)
    return exact


def quantize(
    peer: Peer,
    folder: Path,
    values: F32Array,
    kind: GGMLQuantizationType,
    weights: F32Array | None,
) -> U8Array:
    """Blocks [N, bytes a row] that llama.cpp makes of [N, K] values; `weights` [K]: importance."""
    places = {name: folder / name for name in ("source", "path", "importance")}
    values.tofile(places["source"])
    if weights is not None:
        weights.tofile(places["importance"])
    else:
        del places["importance"]
    request: dict[str, Any] = {name: str(place) for name, place in places.items()}
    request = {"importance": None, "type": int(kind), "shape": values.shape, **request}
    peer.ask(op="quantize", **request)
    return np.fromfile(places["path"], np.uint8).reshape(len(values), -1)

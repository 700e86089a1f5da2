"""A GGUF file again, its matrices encoded otherwise; for benchmarks that make files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quant_shape_to_byte_shape

from tokenmill.models.encodings import BFLOAT16, FLOAT_ENCODINGS, QUANT_ENCODINGS
from tokenmill.models.gguf.reader import read_gguf
from tokenmill.models.mapped import EncodedTensor, TensorInfo, U8Array
from tokenmill.models.quantizing import copy_metadata

F32Array = np.ndarray[Any, np.dtype[np.float32]]
WIDE = ("token_embd.weight", "output.weight")  # kept at 8 bits where others have fewer

_CHUNK_LEN = 2**22  # weights changed at a time


def rewrite(
    source: Path,
    target: Path,
    choose: Callable[[str, TensorInfo], str | None],
    encode: Callable[[EncodedTensor, str], U8Array],
) -> None:
    """Write `target`; `choose` names a matrix's new encoding (None: it stays), `encode` makes it.

    `encode` gets some rows at a time, of each matrix and one matrix after the other.
    """
    file = read_gguf(source)
    writer = GGUFWriter(target, str(file.metadata["general.architecture"]))
    copy_metadata(source, writer)
    chosen = {
        name: choose(name, tensor.info) if len(tensor.info.shape) == 2 else None
        for name, tensor in file.tensors.items()
    }
    for name, tensor in file.tensors.items():
        kind = GGMLQuantizationType[chosen[name] or tensor.info.encoding]
        *_, row_bytes = quant_shape_to_byte_shape(tensor.info.shape, kind)
        size_bytes = row_bytes * int(np.prod(tensor.info.shape[:-1]))
        dtype = np.dtype(np.float32)  # so that the shape is taken as it is
        writer.add_tensor_info(name, tensor.info.shape, dtype, size_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in file.tensors.items():
        encoding, read = chosen[name], tensor.read(name)
        if encoding is None:
            writer.write_tensor_data(read.data)
            continue
        step = max(8, _CHUNK_LEN // tensor.info.shape[1] // 8 * 8)
        parts = [
            encode(
                EncodedTensor(name=name, info=read.info, data=read.data[at : at + step]), encoding
            )
            for at in range(0, len(read.data), step)
        ]
        writer.write_tensor_data(np.concatenate(parts))
    writer.close()


def dequantize(tensor: EncodedTensor) -> tuple[F32Array, F32Array | None]:
    """Rows as float32 [N, K], and the step between neighbouring values of each group, [N, K]."""
    if (dtype := FLOAT_ENCODINGS.get(tensor.info.encoding)) is not None:
        return tensor.data.view(dtype).astype(np.float32), None
    encoding = QUANT_ENCODINGS[tensor.info.encoding]
    blocks = tensor.data.reshape(len(tensor.data), -1, encoding.block_bytes)
    weight = encoding.unpack(blocks)
    scales = weight.group_scales()
    assert scales is not None
    group = weight.shape[1] // scales.shape[1]
    return weight.dequantize(), np.abs(scales).repeat(group, axis=1)


def as_bf16(values: F32Array) -> U8Array:
    rounded: U8Array = values.astype(BFLOAT16).view(np.uint8)
    return rounded

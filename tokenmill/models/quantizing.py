"""A GGUF file with its matrices rounded to 8 or 4 bits, for us and for llama.cpp alike.

`q8` becomes ggml's Q8_0 and `q4` its Q4_1, which hold these formats to the bit. Scales are those of
`ir/rounding.py`, which looks for the least squared error of each group and needs no calibration.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenmill.errors import ModelFileError, UnsupportedModelError, UsageError
from tokenmill.ir.formats import GROUP, Weight
from tokenmill.models.encodings import FLOAT_ENCODINGS, QUANT_ENCODINGS, REQUANTIZED_ENCODINGS
from tokenmill.models.gguf import GgufFile, read_gguf
from tokenmill.models.home import require_space, storage_errors, sync_dir
from tokenmill.models.mapped import TensorInfo, U8Array
from tokenmill.models.progress import Progress, SilentProgress
from tokenmill.models.weights import decode

ENCODINGS = {"q8": "Q8_0", "q4": "Q4_1"}
"""By format: how a file encodes it."""

_WIDE = ("token_embd.weight", "output.weight")  # 4 bits there cost 10 % error in the logits
_FILE_TYPES = {"q8": 7, "q4": 3}  # LlamaFileType.MOSTLY_Q8_0, MOSTLY_Q4_1
_BLOCK_BYTES = {"q8": 34, "q4": 20}
_REPLACED = ("general.architecture", "general.file_type", "general.quantization_version")


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What was written: sizes of both files in bytes, and the largest error of a tensor."""

    source_bytes: int
    target_bytes: int
    num_rounded: int
    relative_error: float


def quantize_gguf(
    source: Path, target: Path, format_name: str, progress: Progress | None = None
) -> Quantized:
    """Write `target`, which must not exist yet; nobody ever sees a part of it.

    A matrix that would not become smaller stays as it is. Raises UsageError for a target that
    exists or a source that has nothing to gain, UnsupportedModelError for one that is no GGUF
    file, ModelFileError for a damaged one.
    """
    if source.suffix != ".gguf":
        raise UnsupportedModelError(f"{source}: only a GGUF file can be quantised to another one")
    if target.exists():
        raise UsageError(f"{target} exists already: remove it, or choose another name")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is no folder: make it first")
    file = read_gguf(source)
    formats = {name: _format_of(name, t.info, format_name) for name, t in file.tensors.items()}
    if not any(formats.values()):
        raise UsageError(f"{source}: no matrix would become smaller as {format_name}")
    sizes = {n: _size(t.info, formats[n]) for n, t in file.tensors.items()}
    require_space(target.parent, sum(sizes.values()))
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with storage_errors(target):
        try:
            errors = _write(file, temporary, formats, sizes, format_name, progress)
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            temporary.replace(target)
            sync_dir(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return Quantized(
        source_bytes=sum(t.info.size_bytes for t in file.tensors.values()),
        target_bytes=sum(sizes.values()),
        num_rounded=len(errors),
        relative_error=max(errors, default=0.0),
    )


def _format_of(name: str, info: TensorInfo, wanted: str) -> str | None:
    """The format that a tensor is rounded to; None: it stays as it is."""
    known = (*FLOAT_ENCODINGS, *QUANT_ENCODINGS, *REQUANTIZED_ENCODINGS)
    if len(info.shape) != 2 or info.shape[1] % GROUP or info.encoding not in known:
        return None
    chosen = "q8" if name in _WIDE else wanted
    n, k = info.shape
    return chosen if n * k // GROUP * _BLOCK_BYTES[chosen] < info.size_bytes else None


def _size(info: TensorInfo, format_name: str | None) -> int:
    if format_name is None:
        return info.size_bytes
    n, k = info.shape
    return n * k // GROUP * _BLOCK_BYTES[format_name]


def _write(
    file: GgufFile,
    path: Path,
    formats: dict[str, str | None],
    sizes: dict[str, int],
    format_name: str,
    progress: Progress | None,
) -> list[float]:
    """Write header and tensors; the errors of those that were rounded."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, str(file.metadata["general.architecture"]))
    _copy_metadata(file.path, writer)
    writer.add_file_type(_FILE_TYPES[format_name])
    writer.add_quantization_version(2)
    for name, tensor in file.tensors.items():
        chosen = formats[name]
        encoding = GGMLQuantizationType[ENCODINGS[chosen] if chosen else tensor.info.encoding]
        dtype = np.dtype(np.float32)  # so that the shape is taken as it is
        writer.add_tensor_info(name, tensor.info.shape, dtype, sizes[name], encoding)
    errors = []
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total = sum(t.info.size_bytes for t in file.tensors.values())
        with (progress or SilentProgress()).task("quantising", total) as task:
            for name, data, error in _encoded(file, formats):
                writer.write_tensor_data(data)
                task.advance(file.tensors[name].info.size_bytes)
                if error is not None:
                    errors.append(error)
    finally:
        writer.close()
    return errors


def _encoded(
    file: GgufFile, formats: dict[str, str | None]
) -> Iterator[tuple[str, U8Array, float | None]]:
    """Each tensor's bytes, and the error of rounding it."""
    for name, tensor in file.tensors.items():
        chosen, read = formats[name], tensor.read(name)
        if chosen is None:
            yield name, read.data, None
            continue
        try:
            weight, error = decode(read, chosen)
        except ModelFileError as problem:
            raise ModelFileError(f"{file.path}: {problem}") from None
        yield name, encode(weight), error


def encode(weight: Weight) -> U8Array:
    """The blocks of a q8 or q4 weight as ggml lays them out, [N, bytes a row]."""
    assert weight.scales is not None
    n, _ = weight.shape
    quants: U8Array = weight.quants.view(np.uint8).reshape(n, -1, GROUP)
    planes = [weight.scales] if weight.minimums is None else [weight.scales, weight.minimums]
    heads = [np.ascontiguousarray(p)[..., None].view(np.uint8) for p in planes]
    if weight.format == "q4":
        low, high = quants[..., : GROUP // 2], quants[..., GROUP // 2 :]
        quants = low | np.left_shift(high, 4, dtype=np.uint8)
    return np.concatenate([*heads, quants], axis=2).reshape(n, -1)


def _copy_metadata(path: Path, writer: object) -> None:
    """All metadata but what says how the tensors are encoded, or how the file is split."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    assert isinstance(writer, GGUFWriter)
    for name, field in GGUFReader(path).fields.items():
        if name.startswith(("GGUF.", "split.")) or name in _REPLACED:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)

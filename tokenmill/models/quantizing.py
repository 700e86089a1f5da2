"""A model as a GGUF file with its matrices rounded to 8 to 4 bits, for us and for llama.cpp alike.

Each format becomes the type of ggml that holds it to the bit (`q8` Q8_0, `q4` Q4_1, `q4_k` Q4_K).
Scales are those of `ir/rounding.py` and `rounding_k.py`, which look for the least squared error of
each group and need no calibration.
The source is another GGUF file, or a folder of safetensors (gguf/export.py).
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tokenmill.errors import ModelFileError, UsageError
from tokenmill.ir.formats import GROUP
from tokenmill.models.checkpoint import FileCheckpoint, model_path, open_checkpoint
from tokenmill.models.encode import ENCODERS, NARROWER_ROWS, encode
from tokenmill.models.encodings import FLOAT_ENCODINGS, QUANT_ENCODINGS, REQUANTIZED_ENCODINGS
from tokenmill.models.gguf.export import Export, ExportedTensor, export
from tokenmill.models.gguf.reader import read_gguf
from tokenmill.models.home import require_space, storage_errors, sync_dir
from tokenmill.models.mapped import EncodedTensor, TensorInfo, U8Array
from tokenmill.models.progress import Progress, SilentProgress
from tokenmill.models.weights import NARROW, decode

_WIDE = ("token_embd.weight", "output.weight")  # 4 bits there cost 10 % error in the logits
_REPLACED = ("general.architecture", "general.file_type", "general.quantization_version")


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What was written: sizes of both files in bytes, and the largest error of a tensor."""

    source_bytes: int
    target_bytes: int
    num_rounded: int
    relative_error: float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tensor:
    """A tensor to be written; `format` that it is brought to, None: it stays as it is."""

    name: str
    info: TensorInfo
    shape: tuple[int, ...]  # as files have it
    format: str | None
    read: Callable[[], EncodedTensor]

    @property
    def encoding(self) -> str:
        if self.format is None:
            return self.info.encoding
        return "F32" if self.format == "f32" else ENCODERS[self.format].encoding

    @property
    def size_bytes(self) -> int:
        """In the new file."""
        if self.format is None:
            return self.info.size_bytes
        count = int(np.prod(self.info.shape))
        return 4 * count if self.format == "f32" else ENCODERS[self.format].size_bytes(count)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Source:
    """What shall be written; `add_metadata` gives a GGUFWriter all but what encodings there are."""

    path: Path
    architecture: str
    tensors: list[_Tensor]
    add_metadata: Callable[[object], None]


def quantize_model(
    source: Path, target: Path, format_name: str, progress: Progress | None = None
) -> Quantized:
    """Write `target`, which must not exist yet; nobody ever sees a part of it.

    `source` is a GGUF file, of which a matrix that would not become smaller stays as it is, or a
    folder of safetensors. Raises UsageError for a target that exists or a source that has nothing
    to gain, UnsupportedModelError for a folder that no GGUF file can tell of, ModelFileError for
    damaged files.
    """
    if target.exists():
        raise UsageError(f"{target} exists already: remove it, or choose another name")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is no folder: make it first")
    opened = _open(source, format_name)
    if not any(tensor.format in ENCODERS for tensor in opened.tensors):
        raise UsageError(f"{source}: no matrix would become smaller as {format_name}")
    target_bytes = sum(tensor.size_bytes for tensor in opened.tensors)
    require_space(target.parent, target_bytes)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with storage_errors(target):
        try:
            errors = _write(opened, temporary, format_name, progress)
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            temporary.replace(target)
            sync_dir(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return Quantized(
        source_bytes=sum(tensor.info.size_bytes for tensor in opened.tensors),
        target_bytes=target_bytes,
        num_rounded=len(errors),
        relative_error=max(errors, default=0.0),
    )


def _open(source: Path, format_name: str) -> _Source:
    path = model_path(source)
    if path.is_dir():
        return _open_folder(open_checkpoint(path), format_name)
    return _open_gguf(path, format_name)


def _open_gguf(path: Path, format_name: str) -> _Source:
    file = read_gguf(path)
    return _Source(
        path=path,
        architecture=str(file.metadata["general.architecture"]),
        tensors=[
            _Tensor(
                name=name,
                info=tensor.info,
                shape=tensor.info.shape,
                format=_format_of(name, tensor.info, format_name),
                read=partial(tensor.read, name),
            )
            for name, tensor in file.tensors.items()
        ],
        add_metadata=partial(copy_metadata, path),
    )


def _format_of(name: str, info: TensorInfo, wanted: str) -> str | None:
    """The format that a tensor is rounded to; None: it stays as it is."""
    known = (*FLOAT_ENCODINGS, *QUANT_ENCODINGS, *REQUANTIZED_ENCODINGS)
    if len(info.shape) != 2 or info.shape[1] % GROUP or info.encoding not in known:
        return None
    chosen = _nearest(name, info.shape[1], wanted)
    n, k = info.shape
    return chosen if ENCODERS[chosen].size_bytes(n * k) < info.size_bytes else None


def _nearest(name: str, k: int, wanted: str) -> str:
    """The format that a matrix with rows of `k` weights gets where a file shall be `wanted`."""
    if name in _WIDE and wanted in NARROW:
        return "q8"
    return wanted if k % ENCODERS[wanted].layout.block_len == 0 else NARROWER_ROWS[wanted]


def _open_folder(checkpoint: FileCheckpoint, format_name: str) -> _Source:
    exported = export(checkpoint)
    return _Source(
        path=checkpoint.path,
        architecture=exported.architecture,
        tensors=[
            _Tensor(
                name=tensor.name,
                info=tensor.info,
                shape=tensor.shape,
                format=_format_of_exported(tensor, format_name),
                read=partial(exported.read, tensor),
            )
            for tensor in exported.tensors
        ],
        add_metadata=partial(_add_metadata, exported),
    )


def _format_of_exported(tensor: ExportedTensor, wanted: str) -> str | None:
    """The same of a folder's tensor, which may be encoded as no GGUF file has it."""
    if not tensor.is_exact and tensor.info.shape[-1] % GROUP == 0:
        return _nearest(tensor.name, tensor.info.shape[-1], wanted)
    is_kept = tensor.info.encoding in FLOAT_ENCODINGS and not tensor.is_exact
    return None if is_kept or tensor.info.encoding == "F32" else "f32"


def _write(source: _Source, path: Path, format_name: str, progress: Progress | None) -> list[float]:
    """Write header and tensors; the errors of those that were rounded."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, source.architecture)
    source.add_metadata(writer)
    writer.add_file_type(ENCODERS[format_name].file_type)
    writer.add_quantization_version(2)
    for tensor in source.tensors:
        dtype = np.dtype(np.float32)  # so that the shape is taken as it is
        encoding = GGMLQuantizationType[tensor.encoding]
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.size_bytes, encoding)
    errors = []
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total = sum(tensor.info.size_bytes for tensor in source.tensors)
        with (progress or SilentProgress()).task("quantising", total) as task:
            for tensor, data, error in _encoded(source):
                writer.write_tensor_data(data)
                task.advance(tensor.info.size_bytes)
                if error is not None:
                    errors.append(error)
    finally:
        writer.close()
    return errors


def _encoded(source: _Source) -> Iterator[tuple[_Tensor, U8Array, float | None]]:
    """Each tensor's bytes, and the error of rounding it."""
    for tensor in source.tensors:
        try:
            read = tensor.read()
            if tensor.format is None:
                yield tensor, read.data, None
                continue
            weight, error = decode(read, tensor.format)
        except ModelFileError as problem:
            raise ModelFileError(f"{source.path}: {problem}") from None
        if tensor.format == "f32":
            yield tensor, weight.quants.view(np.uint8), None
        else:
            yield tensor, encode(weight), error


def _add_metadata(exported: Export, writer: object) -> None:
    from gguf import GGUFValueType, GGUFWriter

    assert isinstance(writer, GGUFWriter)
    for name, (kind, value) in exported.metadata.items():
        inner = GGUFValueType[kind.strip("[]")] if kind.startswith("[") else None
        outer = GGUFValueType.ARRAY if inner is not None else GGUFValueType[kind]
        if value != []:
            writer.add_key_value(name, value, outer, sub_type=inner)


def copy_metadata(path: Path, writer: object) -> None:
    """All metadata but what says how the tensors are encoded, or how the file is split."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    assert isinstance(writer, GGUFWriter)
    for name, field in GGUFReader(path).fields.items():
        if name.startswith(("GGUF.", "split.")) or name in _REPLACED:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)

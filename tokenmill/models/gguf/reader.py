"""GGUF files: the header parsed with every length checked, the weights left where they lie.

A parser of our own, since `gguf.GGUFReader` takes 1.7 s for a vocabulary of 49 thousand entries
(it makes an array of every string), where this one takes some 20 ms, and since it follows counts
and offsets wherever they point. Layout: github.com/ggml-org/ggml, docs/gguf.md.
"""

import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn

import numpy as np

from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.models.encodings import FLOAT_ENCODINGS, QUANT_ENCODINGS
from tokenmill.models.mapped import MappedTensor, TensorInfo, map_file

MetadataValue = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32

# Far above any real file; they bound the time and memory that a forged header can cost.
_MAX_METADATA = 2**16
_MAX_TENSORS = 2**17
_MAX_ARRAY_LEN = 2**24
_MAX_NAME_BYTES = 2**10
_MAX_DIMENSIONS = 4

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING = 8
_ARRAY = 9
_SCALARS = {
    kind: struct.Struct(f"<{code}")
    for kind, code in enumerate("BbHhIif?--Qqd")
    if kind not in (_STRING, _ARRAY)
}

_TENSOR_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    8: "Q8_0",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    30: "BF16",
}

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class _Span:
    """Where a metadata value lies: `count` items of `kind` from byte `start`."""

    kind: int
    start: int
    count: int
    is_array: bool


class _Cursor:
    """Reads a mapped file front to back and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.position = 0

    def fail(self, problem: str, at: int | None = None) -> NoReturn:
        where = self.position if at is None else at
        raise ModelFileError(f"{self.path}: {problem} (byte {where}); fetch the file again")

    def skip(self, count: int, what: str) -> int:
        """Step over `count` bytes; returns where they begin."""
        start = self.position
        if count > self.size - start:
            self.fail(f"{what} needs {count} bytes, the file ends after {self.size - start}")
        self.position = start + count
        return start

    def unsigned(self, layout: struct.Struct, what: str) -> int:
        value: int = layout.unpack_from(self.data, self.skip(layout.size, what))[0]
        return value

    def count(self, layout: struct.Struct, most: int, what: str) -> int:
        value = self.unsigned(layout, what)
        if value > most:
            self.fail(f"{what} is {value}, at most {most} is possible", self.position - layout.size)
        return value

    def name(self, what: str) -> str:
        length = self.count(_U64, _MAX_NAME_BYTES, f"length of {what}")
        start = self.skip(length, what)
        name = self.data[start : start + length].decode(errors="backslashreplace")
        if not name.isprintable():
            self.fail(f"{what} holds control characters", start)
        return name

    def skip_strings(self, count: int, what: str) -> None:
        # Once for each of some 300,000 strings, hence without the methods above.
        read, data, position, last = _U64.unpack_from, self.data, self.position, self.size - 8
        for _ in range(count):
            if position > last:
                self.fail(f"{what} runs past the end of the file")
            position += 8 + read(data, position)[0]
        if position > self.size:
            self.fail(f"{what} runs past the end of the file")
        self.position = position


class Metadata(Mapping[str, MetadataValue]):
    """The metadata of a GGUF file; a value is decoded when it is first asked for.

    Raises ModelFileError at a string that is not UTF-8.
    """

    def __init__(self, cursor: _Cursor, spans: dict[str, _Span]) -> None:
        self._cursor = cursor
        self._spans = spans
        self._decoded: dict[str, MetadataValue] = {}

    def __getitem__(self, key: str) -> MetadataValue:
        if key not in self._decoded:
            self._decoded[key] = self._decode(key, self._spans[key])
        return self._decoded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def _decode(self, key: str, span: _Span) -> MetadataValue:
        if span.kind == _STRING:
            strings = self._strings(key, span)
            return strings if span.is_array else strings[0]
        layout = _SCALARS[span.kind]
        dtype = np.dtype(layout.format)
        items = np.frombuffer(self._cursor.data, dtype, span.count, span.start).tolist()
        values: list[int] | list[float] = items
        return values if span.is_array else values[0]

    def _strings(self, key: str, span: _Span) -> list[str]:
        strings, start = [], span.start
        read, data = _U64.unpack_from, self._cursor.data
        for i in range(span.count):
            stop = start + 8 + read(data, start)[0]
            try:
                strings.append(data[start + 8 : stop].decode())
            except UnicodeDecodeError:
                what = f"{key}[{i}]" if span.is_array else key
                self._cursor.fail(f"metadata {what} is not UTF-8", start)
            start = stop
        return strings


@dataclass(frozen=True, kw_only=True, eq=False)
class GgufFile:
    """A GGUF file, or all the parts of a split one. Shapes are [rows, columns]."""

    path: Path
    metadata: Metadata
    tensors: dict[str, MappedTensor]


def read_gguf(path: Path) -> GgufFile:
    """Parse the header of a GGUF file; of a split one, given its first part, that of every part.

    Raises ModelFileError for a damaged or forged file, UnsupportedModelError for one of a
    version, byte order or tensor type we do not read.
    """
    paths = split_paths(path)
    metadata, tensors = _read_part(path)
    if metadata.get("split.count", len(paths)) not in (0, len(paths)):
        raise ModelFileError(
            f"{path}: is one part of several, but its name does not say -00001-of-{len(paths):05} "
            "with their number; restore the names of the parts"
        )
    for other in paths[1:]:
        more = _read_part(other)[1]
        if twice := tensors.keys() & more.keys():
            raise ModelFileError(f"{other}: tensor {min(twice)} is in an earlier part too")
        tensors |= more
    return GgufFile(path=path, metadata=metadata, tensors=tensors)


def split_paths(path: Path) -> list[Path]:
    """The files that belong to a GGUF file: itself, and the later parts of a split one."""
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match["stem"], int(match["count"])
    paths = [path.with_name(f"{stem}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    if path not in paths[:1]:
        first = f"{stem}-00001-of-{count:05}.gguf"
        raise ModelFileError(f"{path}: is not the first part of a split file; give {first}")
    return paths


def _read_part(path: Path) -> tuple[Metadata, dict[str, MappedTensor]]:
    cursor = _Cursor(path, map_file(path))
    num_tensors, num_metadata = _read_preamble(cursor)
    spans: dict[str, _Span] = {}
    for _ in range(num_metadata):
        key = cursor.name("a metadata key")
        if key in spans:
            cursor.fail(f"metadata {key} occurs twice")
        spans[key] = _read_span(cursor, key)
    metadata = Metadata(cursor, spans)
    tensors: dict[str, tuple[TensorInfo, int]] = {}
    for _ in range(num_tensors):
        name = cursor.name("a tensor name")
        if name in tensors:
            cursor.fail(f"tensor {name} occurs twice")
        tensors[name] = _read_tensor_info(cursor, name)
    return metadata, _place(cursor, tensors, _alignment(cursor, metadata))


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """Numbers of tensors and of metadata values."""
    if cursor.data[:4] != _MAGIC:
        cursor.fail("is no GGUF file: it does not begin with 'GGUF'")
    cursor.skip(4, "magic")
    version = cursor.unsigned(_U32, "version")
    if version not in _VERSIONS:
        is_big_endian = version & 0xFFFF == 0
        found = "big-endian" if is_big_endian else f"version {version}"
        raise UnsupportedModelError(
            f"{cursor.path}: GGUF is {found}, supported are little-endian versions 2 and 3"
        )
    num_tensors = cursor.count(_U64, _MAX_TENSORS, "number of tensors")
    return num_tensors, cursor.count(_U64, _MAX_METADATA, "number of metadata values")


def _read_span(cursor: _Cursor, key: str) -> _Span:
    what = f"metadata {key}"
    kind, count, is_array = cursor.unsigned(_U32, what), 1, False
    if kind == _ARRAY:
        kind, is_array = cursor.unsigned(_U32, what), True
        count = cursor.count(_U64, _MAX_ARRAY_LEN, f"length of {what}")
    start = cursor.position
    if kind == _STRING:
        cursor.skip_strings(count, what)
    elif kind in _SCALARS:
        cursor.skip(count * _SCALARS[kind].size, what)
    else:
        found = "an array of arrays" if kind == _ARRAY else f"of unknown type {kind}"
        cursor.fail(f"{what} is {found}")
    return _Span(kind, start, count, is_array)


def _read_tensor_info(cursor: _Cursor, name: str) -> tuple[TensorInfo, int]:
    """A tensor's info, and its offset in the data section."""
    what = f"tensor {name}"
    num_dimensions = cursor.count(_U32, _MAX_DIMENSIONS, f"number of dimensions of {what}")
    sizes = [cursor.unsigned(_U64, what) for _ in range(num_dimensions)]
    shape = tuple(reversed(sizes))
    if not shape or not all(shape):
        cursor.fail(f"{what} has shape {list(shape)}")
    encoding, block_len, block_bytes = _tensor_type(cursor, name)
    if shape[-1] % block_len:
        cursor.fail(f"{what}: rows of {shape[-1]} weights do not divide into {encoding} blocks")
    size_bytes = prod(shape) // block_len * block_bytes
    if size_bytes > cursor.size:
        cursor.fail(f"{what} of shape {list(shape)} is larger than the file")
    info = TensorInfo(shape=shape, encoding=encoding, size_bytes=size_bytes)
    return info, cursor.unsigned(_U64, what)


def _tensor_type(cursor: _Cursor, name: str) -> tuple[str, int, int]:
    """Name, weights in a block, bytes of a block."""
    type_id = cursor.unsigned(_U32, f"tensor {name}")
    encoding = _TENSOR_TYPES.get(type_id, "")
    if quant := QUANT_ENCODINGS.get(encoding):
        return encoding, quant.block_len, quant.block_bytes
    if encoding in FLOAT_ENCODINGS:
        return encoding, 1, FLOAT_ENCODINGS[encoding].itemsize
    from gguf.constants import GGML_QUANT_SIZES  # 40 ms to import, and rarely needed

    for known, (block_len, block_bytes) in GGML_QUANT_SIZES.items():
        if known == type_id:
            return known.name, block_len, block_bytes
    raise UnsupportedModelError(
        f"{cursor.path}: tensor {name} is of unknown type {type_id}; "
        f"supported are {', '.join(_TENSOR_TYPES.values())}"
    )


def _alignment(cursor: _Cursor, metadata: Metadata) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0 or value & (value - 1):
        cursor.fail("general.alignment is not a power of two")
    return value


def _place(
    cursor: _Cursor, tensors: Mapping[str, tuple[TensorInfo, int]], alignment: int
) -> dict[str, MappedTensor]:
    """Check that tensors lie within the data section, aligned and apart."""
    data_start = cursor.position + -cursor.position % alignment
    file_bytes = np.frombuffer(cursor.data, np.uint8)
    placed: dict[str, MappedTensor] = {}
    free_from = data_start
    for name, (info, offset) in sorted(tensors.items(), key=lambda item: item[1][1]):
        start = data_start + offset
        if offset % alignment:
            cursor.fail(f"tensor {name} is not aligned to {alignment} bytes", start)
        if start < free_from:
            cursor.fail(f"tensor {name} overlaps the one before it", start)
        if start + info.size_bytes > cursor.size:
            cursor.fail(f"tensor {name} ends beyond the file, which may be truncated", start)
        placed[name] = MappedTensor(info=info, file_bytes=file_bytes, start=start)
        free_from = start + info.size_bytes
    return placed

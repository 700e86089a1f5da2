"""Tensors that lie in mapped files: what a file says of them, and their bytes."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tokenmill.errors import ModelFileError, ModelNotFoundError

U8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a file says of one tensor: `shape` [N, K] or [K], and how its weights are encoded."""

    shape: tuple[int, ...]
    encoding: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedTensor:
    """A tensor as it lies in its file: `data` [N, bytes a row] (a vector: [1, bytes])."""

    name: str
    info: TensorInfo
    data: U8Array


@dataclass(frozen=True, kw_only=True, eq=False)
class MappedTensor:
    """A tensor and where it lies in its file."""

    info: TensorInfo
    file_bytes: U8Array
    start: int

    def read(self, name: str) -> EncodedTensor:
        """The tensor under a name; its data is a view of the file."""
        data = self.file_bytes[self.start : self.start + self.info.size_bytes]
        num_rows = prod(self.info.shape[:-1])
        return EncodedTensor(name=name, info=self.info, data=data.reshape(num_rows, -1))

    def rows(self, start: int, stop: int) -> "MappedTensor":
        """Some rows of a matrix, as a tensor of their own."""
        row_bytes = self.info.size_bytes // self.info.shape[0]
        info = TensorInfo(
            shape=(stop - start, *self.info.shape[1:]),
            encoding=self.info.encoding,
            size_bytes=(stop - start) * row_bytes,
        )
        place = self.start + start * row_bytes
        return MappedTensor(info=info, file_bytes=self.file_bytes, start=place)


@dataclass(frozen=True, kw_only=True, eq=False)
class UnpackedTensor:
    """A matrix that is made of several tensors of a file, each time that it is read.

    `unpack` gives the bytes of all rows; the tensor is those of them that start at `first_row`.
    """

    info: TensorInfo
    unpack: Callable[[], U8Array]
    first_row: int = 0

    def read(self, name: str) -> EncodedTensor:
        """The tensor under a name; its data is a copy."""
        rows = slice(self.first_row, self.first_row + self.info.shape[0])
        return EncodedTensor(name=name, info=self.info, data=self.unpack()[rows])

    def rows(self, start: int, stop: int) -> "UnpackedTensor":
        """Some rows of the matrix, as a tensor of their own."""
        n, k = self.info.shape
        size_bytes = self.info.size_bytes * (stop - start) // n
        info = replace(self.info, shape=(stop - start, k), size_bytes=size_bytes)
        return replace(self, info=info, first_row=self.first_row + start)


FileTensor = MappedTensor | UnpackedTensor


@dataclass(frozen=True, kw_only=True, eq=False)
class StackedTensor:
    """Matrices of one size and encoding, one below the other, as a single one."""

    parts: tuple[FileTensor, ...]

    @property
    def info(self) -> TensorInfo:
        first = self.parts[0].info
        rows = sum(part.info.shape[0] for part in self.parts)
        size_bytes = sum(part.info.size_bytes for part in self.parts)
        return TensorInfo(
            shape=(rows, *first.shape[1:]), encoding=first.encoding, size_bytes=size_bytes
        )

    def read(self, name: str) -> EncodedTensor:
        """The tensor under a name; its data is a copy."""
        data = np.concatenate([part.read(name).data for part in self.parts])
        return EncodedTensor(name=name, info=self.info, data=data)


Tensor = FileTensor | StackedTensor


def map_file(path: Path) -> mmap.mmap:
    """Map a whole file for reading."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path}: no such file; fetch the model again") from None
    except ValueError:
        raise ModelFileError(f"{path}: is empty; fetch the file again") from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error

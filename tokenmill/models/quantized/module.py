"""The tensors of one quantised module, each checked before it is believed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tokenmill.errors import ModelFileError
from tokenmill.models.mapped import MappedTensor, TensorInfo, U8Array, UnpackedTensor

Array = npt.NDArray[np.generic]
F32Array = npt.NDArray[np.float32]
IndexArray = npt.NDArray[np.int64]
Shape = tuple[int, ...]

SCALE_DTYPES = ("F16", "BF16", "F32", "F8_E8M0")

_DTYPES: dict[str, np.dtype[np.generic]] = {
    "I8": np.dtype(np.int8),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Module:
    """A module, such as model.layers.0.mlp.up_proj, and its tensors by the end of their names."""

    where: str
    name: str
    parts: Mapping[str, MappedTensor]

    def shape(self, part: str, dtypes: tuple[str, ...], rank: int | None = None) -> Shape:
        """A part's shape. Raises ModelFileError if it is missing, or of another kind."""
        tensor = self.parts.get(part)
        if tensor is None:
            raise self.wrong(part, "is missing", "the file is incomplete")
        if tensor.info.encoding not in dtypes:
            raise self.wrong(part, f"is {tensor.info.encoding}", f"expected {' or '.join(dtypes)}")
        shape = tensor.info.shape
        if (rank is not None and len(shape) != rank) or 0 in shape:
            raise self.wrong(part, f"has shape {list(shape)}", f"expected {rank} dimensions")
        return shape

    def require(self, part: str, dtypes: tuple[str, ...], *shapes: Shape) -> None:
        """Raise ModelFileError unless a part is there in one of the shapes."""
        found = self.shape(part, dtypes)
        if found not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise self.wrong(part, f"has shape {list(found)}", f"expected {expected}")

    def read(self, part: str) -> Array:
        """A part's values, in its own dtype and shape."""
        tensor = self.parts[part]
        data = tensor.read(part).data.reshape(-1)
        return data.view(_DTYPES[tensor.info.encoding]).reshape(tensor.info.shape)

    def read_floats(self, part: str) -> F32Array:
        """A part's values in float32."""
        return self.read(part).astype(np.float32)

    def column_groups(self, part: str, k: int, num_groups: int) -> IndexArray | None:
        """The group of each column, or None where the file leaves that to their order."""
        if part not in self.parts:
            return None
        self.require(part, ("I32", "I64"), (k,))
        groups = self.read(part).astype(np.int64)
        if groups.min() < 0 or groups.max() >= num_groups:
            raise self.wrong(
                part, f"names group {groups.max()}", f"expected groups 0 to {num_groups - 1}"
            )
        return groups

    def weight(
        self, shape: Shape, encoding: str, parts: tuple[str, ...], unpack: Callable[[], U8Array]
    ) -> UnpackedTensor:
        """The module's weight [N, K], of those of `parts` that there are."""
        size_bytes = sum(t.info.size_bytes for name, t in self.parts.items() if name in parts)
        info = TensorInfo(shape=shape, encoding=encoding, size_bytes=size_bytes)
        return UnpackedTensor(info=info, unpack=unpack)

    def wrong(self, part: str, found: str, expected: str) -> ModelFileError:
        return ModelFileError(f"{self.where}: tensor {self.name}.{part} {found}; {expected}")


def find_modules(
    where: str, tensors: Mapping[str, MappedTensor], marks: tuple[str, ...]
) -> list[Module]:
    """The modules that have a part of one of the names in `marks`."""
    by_module: dict[str, dict[str, MappedTensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        by_module.setdefault(module, {})[part] = tensor
    return [
        Module(where=where, name=name, parts=parts)
        for name, parts in by_module.items()
        if any(mark in parts for mark in marks)
    ]


def unpack_bits(words: Array, bits: int) -> npt.NDArray[np.uint8]:
    """int32 [...] -> integers [..., 32 / bits], the lowest bits first; `bits` is 4 or 8."""
    octets = np.ascontiguousarray(words)[..., None].view(np.uint8)
    if bits == 8:
        return octets
    pairs = np.stack([octets & 0x0F, octets >> 4], axis=-1)
    return pairs.reshape(*words.shape, 8)

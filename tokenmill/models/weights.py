"""Weights out of a checkpoint, in the formats that backends pack. N rows, K weights a row."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, sqrt

import numpy as np
import numpy.typing as npt

from tokenmill.errors import ModelFileError, UnsupportedModelError, UsageError
from tokenmill.ir.formats import FORMATS, Weight, quantize
from tokenmill.models.checkpoint import Checkpoint
from tokenmill.models.encodings import (
    BFLOAT16,
    FLOAT_ENCODINGS,
    QUANT_ENCODINGS,
    REQUANTIZED_ENCODINGS,
)
from tokenmill.models.mapped import EncodedTensor, TensorInfo, U8Array
from tokenmill.models.progress import Progress, SilentProgress
from tokenmill.models.quantized.float8 import FLOAT8, as_weight
from tokenmill.models.quantized.integers import (
    INTEGER_ENCODINGS,
    VALUE_ENCODINGS,
    IntegerRows,
)

Array = npt.NDArray[np.generic]
F32Array = npt.NDArray[np.float32]

QUANTIZATIONS = ("auto", *FORMATS)

# 4 bits in the first two cost 10 % error in the logits; the others are small.
_WIDE_NAMES = ("embed", "lm_head", "positions", "segments")
NARROW = ("q4_0", "q4_z", "q4_k", "q4", "q5_k")  # formats that these do not get
_EXACT_PART = "router"  # a rounded one would send tokens to other experts
_IGNORED_SUFFIX = "rotary_emb.inv_freq"  # old folders save it; it follows from rope_theta
_CHUNK_LEN = 2**17  # weights decoded at a time; bounds the temporaries


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedWeight:
    """A weight, and what it cost to bring it into its format.

    `relative_error` is the root mean square of what rounding changed over that of the weights
    as the file has them; 0 where nothing was rounded.
    """

    name: str
    weight: Weight
    source_encoding: str
    relative_error: float


def load_weights(
    checkpoint: Checkpoint,
    names_and_shapes: Mapping[str, tuple[int, ...]],
    quantization: str = "auto",
    progress: Progress | None = None,
) -> Iterator[LoadedWeight]:
    """Decode tensors one at a time, in the order of `names_and_shapes` (canonical names).

    `quantization` "auto" keeps a matrix as near to its file as a format can; a format's name
    rounds every matrix to it, save that `embed` and `lm_head` get q8 instead of 4 or 5 bits.
    Routers are f32 in any case, and so are vectors, shape [1, K]. Raises at once ModelFileError
    for a tensor that is missing or has another shape, UnsupportedModelError for an encoding we
    cannot decode or a tensor that the model does not use; later ModelFileError for one that is not
    finite.
    """
    if quantization not in QUANTIZATIONS:
        raise UsageError(
            f"quantization is {quantization!r}, possible are {', '.join(QUANTIZATIONS)}"
        )
    for name, shape in names_and_shapes.items():
        _check_tensor(checkpoint, name, shape)
    _check_unused(checkpoint, names_and_shapes)
    return _load(checkpoint, list(names_and_shapes), quantization, progress or SilentProgress())


def target_formats(
    checkpoint: Checkpoint, names_and_shapes: Mapping[str, tuple[int, ...]], quantization: str
) -> dict[str, str]:
    """The format that each matrix will get, without reading it. Raises as `load_weights` does."""
    for name, shape in names_and_shapes.items():
        _check_tensor(checkpoint, name, shape)
    return {
        name: _target(name, checkpoint.tensors[name], quantization)
        for name, shape in names_and_shapes.items()
        if len(shape) == 2
    }


def _load(
    checkpoint: Checkpoint, names: list[str], quantization: str, progress: Progress
) -> Iterator[LoadedWeight]:
    total_bytes = sum(checkpoint.tensors[name].size_bytes for name in names)
    with progress.task("decoding weights", total_bytes) as task:
        for name in names:
            info = checkpoint.tensors[name]
            try:
                weight, error = decode(checkpoint.read(name), _target(name, info, quantization))
            except ModelFileError as error_:
                raise ModelFileError(f"{checkpoint.path}: {error_}") from None
            task.advance(info.size_bytes)
            yield LoadedWeight(
                name=name, weight=weight, source_encoding=info.encoding, relative_error=error
            )


def _check_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    info = checkpoint.tensors.get(name)
    where = f"{checkpoint.path}: tensor {checkpoint.name_in_files(name)}"
    if info is None:
        raise ModelFileError(f"{where} is missing; the file is incomplete or of another model")
    if info.shape != shape:
        raise ModelFileError(f"{where} has shape {list(info.shape)}, expected {list(shape)}")
    known = FLOAT_ENCODINGS if len(shape) == 1 else _matrix_encodings()
    if info.encoding not in known:
        raise UnsupportedModelError(
            f"{where} is encoded as {info.encoding}, supported are {', '.join(known)}"
        )


def _matrix_encodings() -> list[str]:
    others = (*INTEGER_ENCODINGS, FLOAT8, *VALUE_ENCODINGS)
    return [*FLOAT_ENCODINGS, *QUANT_ENCODINGS, *REQUANTIZED_ENCODINGS, *others]


def _check_unused(checkpoint: Checkpoint, used: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that we would leave out: the model would compute something else."""
    unused = [
        name
        for name in checkpoint.tensors
        if name not in used
        and not name.endswith(_IGNORED_SUFFIX)
        and not (name == "lm_head" and checkpoint.config.is_tied)
    ]
    if unused:
        first = checkpoint.name_in_files(unused[0])
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise UnsupportedModelError(
            f"{checkpoint.path}: tensor {first!r}{more} is not part of a "
            f"{checkpoint.config.architecture} model as we compute it"
        )


def _target(name: str, info: TensorInfo, quantization: str) -> str:
    """The format that a tensor shall get."""
    if len(info.shape) == 1:
        return "f32"
    if name.rpartition(".")[2] == _EXACT_PART:
        return "f32"
    if quantization in NARROW and name in _WIDE_NAMES:
        return "q8"
    if quantization != "auto":
        return quantization
    if info.encoding in FLOAT_ENCODINGS:
        return "bf16"
    if (encoding := QUANT_ENCODINGS.get(info.encoding)) is not None:
        return encoding.format
    return "f8" if info.encoding == FLOAT8 else INTEGER_ENCODINGS.get(info.encoding, "q8")


def decode(tensor: EncodedTensor, format_name: str) -> tuple[Weight, float]:
    """A tensor in a format, and the relative error of rounding it.

    Raises ModelFileError if a weight is not finite, or out of the range of the format.
    """
    n, k = tensor.data.shape[0], tensor.info.shape[-1]
    planes = _Planes(format_name, n, k)
    squared_error = squared_norm = 0.0
    step = max(1, _CHUNK_LEN // k)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        with np.errstate(over="ignore", invalid="ignore"):
            weight, values = _decode_rows(tensor.data[rows], tensor.info, format_name)
        _check_finite(tensor, weight, values)
        planes.put(rows, weight)
        if values is not None:
            squared_error += _squared_norm(weight.dequantize() - values)
            squared_norm += _squared_norm(values)
    error = sqrt(squared_error / squared_norm) if squared_error else 0.0
    return planes.weight(), error


def _decode_rows(
    data: U8Array, info: TensorInfo, format_name: str
) -> tuple[Weight, F32Array | None]:
    """Some rows in a format; and, if they may have been rounded, the weights before that."""
    encoding_name = info.encoding
    if (dtype := FLOAT_ENCODINGS.get(encoding_name)) is not None:
        floats = data.view(dtype)
        if FORMATS[format_name].quant_dtype == dtype:
            return Weight(format=format_name, quants=floats), None
        values = floats.astype(np.float32)
    elif (encoding := QUANT_ENCODINGS.get(encoding_name)) is not None:
        unpacked = encoding.unpack(data.reshape(data.shape[0], -1, encoding.block_bytes))
        if unpacked.format == format_name:
            return unpacked, None
        values = unpacked.dequantize()
    elif encoding_name in INTEGER_ENCODINGS:
        integers = IntegerRows.from_bytes(data, info.shape[-1])
        values = integers.dequantize()
        if (nearest := integers.as_weight(format_name)) is not None:
            return nearest, values
    elif encoding_name == FLOAT8:
        numbers = as_weight(data, info.shape[-1])
        if format_name == numbers.format:
            return numbers, None
        values = numbers.dequantize()
    elif encoding_name in VALUE_ENCODINGS:
        values = data.view(np.float32)
    else:
        values = _dequantize_by_gguf(data, encoding_name)
    return quantize(values, format_name), None if format_name == "f32" else values


def _dequantize_by_gguf(data: U8Array, encoding_name: str) -> F32Array:
    from gguf import GGMLQuantizationType, quants

    values: F32Array = quants.dequantize(data, GGMLQuantizationType[encoding_name])
    return values


def _squared_norm(values: npt.NDArray[np.floating]) -> float:
    flat = values.reshape(-1)
    with np.errstate(over="ignore"):
        norm = float(np.dot(flat, flat))
    return norm if isfinite(norm) else _squared_norm(flat.astype(np.float64))


def _check_finite(tensor: EncodedTensor, weight: Weight, values: F32Array | None) -> None:
    planes = [p for p in (weight.scales, weight.minimums) if p is not None]
    if not FORMATS[weight.format].is_integer:
        planes.append(weight.quants)
    if all(_is_finite(plane) for plane in planes):
        return
    if values is not None and _is_finite(values):
        wider = "f32" if weight.format == "bf16" else "bf16"
        raise ModelFileError(
            f"tensor {tensor.name} holds weights too large for {weight.format}; "
            f"use --quantization {wider}"
        )
    raise ModelFileError(f"tensor {tensor.name} holds weights that are infinite or not a number")


def _is_finite(values: Array) -> bool:
    if values.dtype == BFLOAT16:  # by its bits: NumPy would take it value by value
        exponents = np.bitwise_and(values.view(np.uint16), 0x7F80)
        return not bool((exponents == 0x7F80).any())
    return bool(np.isfinite(values).all())


class _Planes:
    """The arrays of a weight, filled some rows at a time."""

    def __init__(self, format_name: str, n: int, k: int) -> None:
        row = FORMATS[format_name]
        self._format = format_name
        self._arrays: dict[str, Array] = {"quants": np.empty((n, k), row.quant_dtype)}
        for name, (shape, dtype) in row.planes(n, k).items():
            self._arrays[name] = np.empty(shape, dtype)

    def put(self, rows: slice, weight: Weight) -> None:
        for name, array in self._arrays.items():
            array[rows] = getattr(weight, name)

    def weight(self) -> Weight:
        return Weight(format=self._format, **self._arrays)

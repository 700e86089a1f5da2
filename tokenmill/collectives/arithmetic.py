"""Types of elements, and reductions over them.

f16 and bf16 are summed in f32 and rounded once for each message that a partial result travels in.
Integers wrap around, as everywhere; their average is rounded towards zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import UsageError

Array: TypeAlias = NDArray[Any]
Bytes: TypeAlias = NDArray[np.uint8]
Reduce: TypeAlias = Callable[[NDArray[Any], NDArray[Any]], None]
"""(target, source): target := target op source. Either may hold elements or accumulators."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DataType:
    """A type of elements, and that of its accumulators."""

    name: str
    numpy: "np.dtype[Any]"
    wide: "np.dtype[Any]"

    @property
    def is_narrow(self) -> bool:
        """Accumulators are wider than elements."""
        return self.wide != self.numpy


def _data_types() -> tuple[DataType, ...]:
    f32 = np.dtype(np.float32)
    plain: dict[str, np.dtype[Any]] = {
        "f32": f32,
        "f64": np.dtype(np.float64),
        "i8": np.dtype(np.int8),
        "i32": np.dtype(np.int32),
        "i64": np.dtype(np.int64),
        "u8": np.dtype(np.uint8),
    }
    narrow: dict[str, np.dtype[Any]] = {
        "f16": np.dtype(np.float16),
        "bf16": np.dtype(ml_dtypes.bfloat16),
    }
    return tuple(
        DataType(name=name, numpy=dtype, wide=f32 if name in narrow else dtype)
        for name, dtype in (plain | narrow).items()
    )


DATA_TYPES = _data_types()
_BY_NUMPY = {t.numpy: t for t in DATA_TYPES}
_BY_NAME = {t.name: t for t in DATA_TYPES}

REDUCTIONS = ("sum", "avg", "prod", "max", "min")
_UFUNCS: dict[str, "np.ufunc"] = {
    "sum": np.add,
    "avg": np.add,
    "prod": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
}


def data_type_of(array: Array) -> DataType:
    """The type of an array's elements. Raises UsageError for one that does not travel."""
    found = _BY_NUMPY.get(array.dtype)
    if found is None:
        names = ", ".join(t.name for t in DATA_TYPES)
        raise UsageError(f"elements of type {array.dtype} do not travel: give one of {names}")
    return found


def data_type(name: str) -> DataType:
    """By name, as `f32`. Raises UsageError."""
    if name not in _BY_NAME:
        raise UsageError(f"no type {name!r}: give one of {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def check_reduction(name: str) -> None:
    """Raise UsageError unless there is such a reduction."""
    if name not in REDUCTIONS:
        raise UsageError(f"no reduction {name!r}: give one of {', '.join(REDUCTIONS)}")


def make_reducer(reduction: str, dtype: DataType) -> Reduce:
    """The function that reduces arrays of one size."""
    ufunc = _UFUNCS[reduction]

    def reduce_plain(target: Array, source: Array) -> None:
        ufunc(target, source, out=target)

    def reduce_narrow(target: Array, source: Array) -> None:
        total = target.astype(dtype.wide, copy=False)
        ufunc(total, source.astype(dtype.wide, copy=False), out=total)
        if total is not target:
            target[...] = total.astype(dtype.numpy)

    return reduce_narrow if dtype.is_narrow else reduce_plain


def divide(result: Array, dtype: DataType, ranks: int) -> None:
    """Make an average of a sum, in place."""
    if dtype.numpy.kind in "iu":
        wide = result.astype(np.int64)
        result[...] = (np.sign(wide) * (np.abs(wide) // ranks)).astype(dtype.numpy)
    elif dtype.is_narrow:
        result[...] = (result.astype(dtype.wide) / dtype.wide.type(ranks)).astype(dtype.numpy)
    else:
        np.divide(result, dtype.numpy.type(ranks), out=result)

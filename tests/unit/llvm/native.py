"""Compiles what a test emits, and calls it on arrays."""

import ctypes
from collections.abc import Callable

import numpy as np

from tokenmill.backends.llvm.compile import LoadedObject, compile_object, load_object
from tokenmill.backends.llvm.emit import Module, Value, size_of
from tokenmill.backends.llvm.lanes import Lanes
from tokenmill.backends.llvm.target import ROWS, Row, missing_features
from tokenmill.ir.order import LANES

AnyArray = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

ROW_NAMES = [row.name for row in ROWS if not missing_features(row)]
"""The instruction sets that this machine can run."""


def aligned(size_bytes: int) -> AnyArray:
    """Zeroed bytes that start at a multiple of 64."""
    whole = np.zeros(size_bytes + 64, np.uint8)
    start = -whole.ctypes.data % 64
    return whole[start : start + size_bytes]


def load(module: Module, row: Row) -> LoadedObject:
    return load_object(compile_object(str(module), row))


def call(loaded: LoadedObject, symbol: str, *arguments: int) -> None:
    """Call a function of integers and pointers; all of them are 64 bits wide."""
    kinds = [ctypes.c_int64] * len(arguments)
    ctypes.CFUNCTYPE(None, *kinds)(loaded.address(symbol))(*arguments)


def apply(
    row: Row,
    compute: Callable[[Lanes, Value], Value],
    values: AnyArray,
    kinds: tuple[str, str],
    dtype: type,
) -> AnyArray:
    """What `compute` makes of an array, LANES elements at a time.

    `kinds` are the vector types that it takes and gives; `dtype` is that of the result.
    """
    module = Module("apply")
    f = module.function(
        "apply", "void", [("source", "ptr"), ("target", "ptr"), ("count", "i64")], public=True
    )
    source, target, count = f.parameters
    with f.loop(0, count) as index:
        loaded = f.load(kinds[0], source.at(index * size_of(kinds[0])))
        f.store(compute(Lanes(f, row), loaded), target.at(index * size_of(kinds[1])))
    f.ret()
    vectors = -(-len(values) // LANES)
    padded = np.zeros(vectors * LANES, values.dtype)
    padded[: len(values)] = values
    out = np.zeros(vectors * LANES, dtype)
    call(load(module, row), "apply", padded.ctypes.data, out.ctypes.data, vectors)
    return out[: len(values)]

"""Compiles what a test emits, and calls it on arrays: here, or in an emulator of another CPU."""

import ctypes
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from _pytest.mark.structures import ParameterSet

from tests.unit.llvm import avx_vnni
from tests.unit.llvm.avx_vnni import WHY_NO_TRAP
from tests.unit.llvm.emulator import WHY_NO_EMULATOR, EmulatedObject
from tokenmill.backends.llvm.compile import LoadedObject, compile_object, load_object
from tokenmill.backends.llvm.emit import Module, Value, size_of
from tokenmill.backends.llvm.lanes import Lanes
from tokenmill.backends.llvm.target import (
    ROWS,
    Row,
    foreign_row,
    host_arch,
    missing_features,
    pick_row,
)
from tokenmill.ir.order import LANES

AnyArray = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

ROW_NAMES = [row.name for row in ROWS if not missing_features(row)]
"""The instruction sets that this machine can run."""

FOREIGN_NAMES = [row.name for row in ROWS if row.arch == "aarch64" != host_arch()]
"""Those that an emulator may run for it."""


def _unless(reason: str, names: Iterable[str]) -> list[ParameterSet]:
    return [pytest.param(n, marks=pytest.mark.skipif(bool(reason), reason=reason)) for n in names]


WHOLE_ROWS = [
    *ROW_NAMES,
    *_unless(WHY_NO_TRAP, {avx_vnni.ROW} - {*ROW_NAMES} if host_arch() == "x86_64" else ()),
]
"""Parameters for tests that run whole programs on every row of this architecture."""

ALL_ROWS = [*WHOLE_ROWS, *_unless(WHY_NO_EMULATOR, FOREIGN_NAMES)]
"""Parameters for tests that run kernels on every row."""


def row_named(name: str) -> Row:
    """The row; afterwards this process can run its code, or `load` gives it to an emulator."""
    if name in ROW_NAMES or name not in (avx_vnni.ROW, *FOREIGN_NAMES):
        return pick_row(name)
    if name == avx_vnni.ROW:
        avx_vnni.install()  # does the one instruction that is missing; all else is run as it is
    return foreign_row(name)


def aligned(size_bytes: int) -> AnyArray:
    """Zeroed bytes that start at a multiple of 64."""
    whole = np.zeros(size_bytes + 64, np.uint8)
    start = -whole.ctypes.data % 64
    return whole[start : start + size_bytes]


def load(module: Module, row: Row) -> LoadedObject | EmulatedObject:
    code = compile_object(str(module), row)
    if row.name in FOREIGN_NAMES:
        return EmulatedObject(code, [f.name for f in module.functions if f.public])
    return load_object(code)


def call(loaded: LoadedObject | EmulatedObject, symbol: str, *arguments: int | AnyArray) -> None:
    """Call a function of 64-bit integers and addresses of arrays, which it may change."""
    if isinstance(loaded, EmulatedObject):
        loaded.call(symbol, *arguments)
        return
    words = [a if isinstance(a, int) else a.ctypes.data for a in arguments]
    kinds = [ctypes.c_int64] * len(words)
    ctypes.CFUNCTYPE(None, *kinds)(loaded.address(symbol))(*words)


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
    call(load(module, row), "apply", padded, out, vectors)
    return out[: len(values)]

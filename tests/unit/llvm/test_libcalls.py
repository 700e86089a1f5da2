"""Half and bfloat conversions on a processor without them, against NumPy and ml_dtypes."""

import ctypes

import ml_dtypes
import numpy as np
import pytest

from tokenmill.backends.llvm.compile import compile_object, load_object
from tokenmill.backends.llvm.target import pick_row

CONVERT = """
define void @convert(ptr %from, ptr %to, i64 %count) {
entry:
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %next, %loop ]
  %source = getelementptr FROM, ptr %from, i64 %i
  %target = getelementptr TO, ptr %to, i64 %i
  %x = load FROM, ptr %source
  %y = HOW FROM %x to TO
  store TO %y, ptr %target
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, %count
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""


def convert(values: np.ndarray, how: str, source: str, target: str, dtype: type) -> np.ndarray:
    text = CONVERT.replace("FROM", source).replace("TO", target).replace("HOW", how)
    loaded = load_object(compile_object(text, pick_row("portable")))
    result = np.empty(len(values), dtype)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    address = loaded.address("convert")
    function(address)(values.ctypes.data, result.ctypes.data, len(values))
    return result


def same(a: np.ndarray, b: np.ndarray) -> None:
    """Equal bit by bit, NaN for NaN."""
    bits = np.dtype(f"u{a.itemsize}")
    is_nan = np.isnan(a.astype(np.float32))
    np.testing.assert_array_equal(is_nan, np.isnan(b.astype(np.float32)))
    np.testing.assert_array_equal(a.view(bits)[~is_nan], b.view(bits)[~is_nan])


@pytest.fixture(scope="module")
def floats() -> np.ndarray:
    """All floats around every half and bfloat value and their midpoints, and random bits."""
    rng = np.random.default_rng(0)
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    highs = np.arange(65536, dtype=np.uint32) << 16
    near = [base + step for base in (halves, highs) for step in (0, 1, 0xFFFFFFFF)]
    ties = [halves + 0x1000 + step for step in (0, 1, 0xFFFFFFFF)]
    ties += [highs + 0x8000 + step for step in (0, 1, 0xFFFFFFFF)]
    anything = rng.integers(0, 1 << 32, 200_000, dtype=np.uint64)
    small = rng.integers(0x33000000, 0x38900000, 200_000, dtype=np.uint64)
    bits = np.concatenate([x.astype(np.uint32) for x in [*near, *ties, anything, small]])
    return bits.view(np.float32)


def test_half_to_float():
    values = np.arange(65536, dtype=np.uint16).view(np.float16)
    same(convert(values, "fpext", "half", "float", np.float32), values.astype(np.float32))


@pytest.mark.filterwarnings("ignore:overflow")
def test_float_to_half(floats):
    same(convert(floats, "fptrunc", "float", "half", np.float16), floats.astype(np.float16))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_float_to_bfloat(floats):
    expected = floats.astype(ml_dtypes.bfloat16)
    same(convert(floats, "fptrunc", "float", "bfloat", ml_dtypes.bfloat16), expected)

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tokenmill.backends.llvm.compile import (
    InvalidIrError,
    assembly,
    compile_object,
    load_object,
    optimized_ir,
)
from tokenmill.backends.llvm.target import ROWS, missing_features, pick_row

ROW_NAMES = [row.name for row in ROWS if not missing_features(row)]

ADD = """
define i32 @add_NUMBER(i32 %a) {
  %slot = alloca i32
  store i32 %a, ptr %slot
  %b = load i32, ptr %slot
  %c = add i32 %b, NUMBER
  ret i32 %c
}
"""


@pytest.fixture(params=ROW_NAMES)
def row(request: pytest.FixtureRequest):
    return pick_row(request.param)


def adding(number: int) -> str:
    return ADD.replace("NUMBER", str(number))


def call(data: bytes, name: str, argument: int) -> int:
    loaded = load_object(data)
    return ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32)(loaded.address(name))(argument)


@pytest.mark.parametrize("opt_level", [1, 2])
def test_what_is_compiled_runs(row, opt_level):
    assert call(compile_object(adding(7), row, opt_level=opt_level), "add_7", 35) == 42


def test_objects_of_one_name_do_not_meet(row):
    first = compile_object(adding(1), row)
    other = compile_object(adding(2).replace("add_2", "add_1"), row)
    loaded = [load_object(first), load_object(other)]
    functions = [
        ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32)(x.address("add_1")) for x in loaded
    ]
    assert [f(10) for f in functions] == [11, 12]


def test_compiling_in_threads_gives_the_same_bytes(row):
    texts = [adding(n) * 1 + adding(n + 100) for n in range(12)]
    alone = [compile_object(text, row) for text in texts]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda text: compile_object(text, row), texts)) == alone


def test_slots_become_registers(row):
    assert "alloca" not in optimized_ir(adding(1) + adding(2), row)
    assert "add_2" not in optimized_ir(adding(1) + adding(2), row, "add_1")


def test_assembly_of_one_function(row):
    text = assembly(adding(1) + adding(2), row, "add_2")
    assert text.startswith("add_2:")
    assert "add_1" not in text
    with pytest.raises(KeyError, match="add_3"):
        assembly(adding(1), row, "add_3")


def test_a_type_error_names_the_line():
    bad = "define void @f() {\n  %x = add i32 1, 2.5\n  ret void\n}\n"
    with pytest.raises(InvalidIrError, match=r"line 2 .*floating point(.|\n)*%x = add i32 1, 2.5"):
        compile_object(bad, pick_row())


def test_a_verifier_error_names_the_instruction():
    bad = (
        "define i32 @f(i32 %a) {\nentry:\n  br i1 true, label %x, label %y\nx:\n"
        "  %v = add i32 %a, 1\n  br label %y\ny:\n  ret i32 %v\n}\n"
    )
    with pytest.raises(InvalidIrError, match=r"dominate(.|\n)*%v = add i32 %a, 1"):
        compile_object(bad, pick_row())


def test_a_symbol_that_is_nowhere_is_an_error_and_no_abort(row):
    text = "declare void @nowhere()\ndefine void @f() {\n  call void @nowhere()\n  ret void\n}\n"
    with pytest.raises(KeyError):
        load_object(compile_object(text, row)).address("f")
    with pytest.raises(KeyError, match="absent"):
        load_object(compile_object(adding(1), row)).address("absent")


def test_library_functions_that_llvm_inserts_are_found(row):
    """fma and rint are calls on old processors, memset of an unknown size everywhere."""
    text = """
    declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
    declare <16 x float> @llvm.rint.v16f32(<16 x float>)
    declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
    define void @f(ptr %p, i64 %size) {
      %x = load <16 x float>, ptr %p, align 4
      %y = call <16 x float> @llvm.fma.v16f32(<16 x float> %x, <16 x float> %x, <16 x float> %x)
      %z = call <16 x float> @llvm.rint.v16f32(<16 x float> %y)
      store <16 x float> %z, ptr %p, align 4
      call void @llvm.memset.p0.i64(ptr %p, i8 0, i64 %size, i1 false)
      ret void
    }
    """
    x = np.arange(16, dtype=np.float32) / 3
    expected = np.rint(x * x + x)
    expected[:2] = 0
    loaded = load_object(compile_object(text, row))
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(loaded.address("f"))(x.ctypes.data, 8)
    np.testing.assert_array_equal(x, expected)


def test_a_frame_larger_than_the_guard_page_works(row):
    text = """
    define i8 @f(i32 %at) {
      %buffer = alloca [262144 x i8]
      %place = getelementptr i8, ptr %buffer, i32 %at
      store volatile i8 42, ptr %place
      %value = load volatile i8, ptr %place
      ret i8 %value
    }
    """
    loaded = load_object(compile_object(text, row))
    assert ctypes.CFUNCTYPE(ctypes.c_int8, ctypes.c_int32)(loaded.address("f"))(0) == 42

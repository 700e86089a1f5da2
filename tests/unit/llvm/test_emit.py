"""Emission is typed: a mistake raises where it is made, not in LLVM."""

import pytest

from tokenmill.backends.llvm.compile import compile_object
from tokenmill.backends.llvm.emit import Function, Module, Value, lanes_of, size_of, vector
from tokenmill.backends.llvm.target import pick_row

I32X4, F32X4 = vector("i32", 4), vector("float", 4)


@pytest.fixture
def f() -> Function:
    kinds = ("i1", "i32", "i64", "float", "half", "bfloat", "ptr", I32X4, F32X4, "<4 x i1>")
    parameters = [(name_of(kind), kind) for kind in kinds]
    return Module("test").function("f", "void", parameters, public=True)


def name_of(kind: str) -> str:
    return "a" + kind.strip("<>").replace(" ", "")


def get(f: Function, kind: str) -> Value:
    return next(p for p in f.parameters if p.type == kind)


MISTAKES = {
    "add of two types": lambda f, v: v("i32") + v("i64"),
    "add of vector and scalar": lambda f, v: v(I32X4) + v("i32"),
    "subtraction of two types": lambda f, v: v("float") - v("half"),
    "number minus pointer": lambda f, v: 1 - v("ptr"),
    "product of pointers": lambda f, v: v("ptr") * 2,
    "true division of integers": lambda f, v: v("i32") / 2,
    "floor division of floats": lambda f, v: v("float") // 2.0,
    "signed division of floats": lambda f, v: v("float").divide_signed(2.0),
    "remainder of floats": lambda f, v: v("float") % 2.0,
    "and of floats": lambda f, v: v("float") & v("float"),
    "or of two types": lambda f, v: v("i32") | v(I32X4),
    "xor of pointers": lambda f, v: v("ptr") ^ v("ptr"),
    "shift of floats": lambda f, v: v(F32X4) << 1,
    "shift by another type": lambda f, v: v("i64") >> v("i32"),
    "signed shift of floats": lambda f, v: v("float").shift_signed(1),
    "comparison of two types": lambda f, v: v("i32").compare("eq", v("i64")),
    "floats compared like integers": lambda f, v: v("float").compare("slt", 1.0),
    "integers compared like floats": lambda f, v: v("i32").compare("olt", 1),
    "offset into an integer": lambda f, v: v("i64").at(8),
    "offset by a float": lambda f, v: v("ptr").at(v("float")),
    "variable set to another type": lambda f, v: f.variable("i32").set(v("i64")),
    "variable that starts as another type": lambda f, v: f.variable(F32X4, v("float")),
    "too few lanes": lambda f, v: f.lanes(I32X4, [1, 2, 3]),
    "load from an integer": lambda f, v: f.load("i32", v("i64")),
    "store to an integer": lambda f, v: f.store(v("i32"), v("i64")),
    "prefetch of an integer": lambda f, v: (f.prefetch(v("ptr")), f.prefetch(v("i64"))),
    "atomic add to an integer": lambda f, v: f.atomic_add(v("i64"), v("i64")),
    "atomic add of a vector": lambda f, v: f.atomic_add(v("ptr"), v(I32X4)),
    "zext of a float": lambda f, v: f.cast("zext", v("float"), "i64"),
    "sext to a narrower type": lambda f, v: f.cast("sext", v("i64"), "i32"),
    "trunc to a wider type": lambda f, v: f.cast("trunc", v("i32"), "i64"),
    "trunc to the same type": lambda f, v: f.cast("trunc", v("i32"), "i32"),
    "fpext of a half to a bfloat": lambda f, v: f.cast("fpext", v("half"), "bfloat"),
    "fptrunc to a wider type": lambda f, v: f.cast("fptrunc", v("half"), "float"),
    "sitofp of a float": lambda f, v: f.cast("sitofp", v("float"), "float"),
    "uitofp to an integer": lambda f, v: f.cast("uitofp", v("i32"), "i64"),
    "fptosi of an integer": lambda f, v: f.cast("fptosi", v("i32"), "i32"),
    "bitcast to another size": lambda f, v: f.bitcast(v(I32X4), "i64"),
    "widening of a float": lambda f, v: f.widen(v("float")),
    "select between two types": lambda f, v: f.select(v("i1"), v("i32"), v("i64")),
    "select by an integer": lambda f, v: f.select(v("i32"), v("i32"), 0),
    "select of scalars by lanes": lambda f, v: f.select(v("<4 x i1>"), v("i32"), 0),
    "select between two numbers": lambda f, v: f.select(v("i1"), 1, 2),
    "splat of a vector": lambda f, v: f.splat(v(I32X4), 4),
    "shuffle of two types": lambda f, v: f.shuffle(v(I32X4), v(F32X4), [0]),
    "shuffle beyond the lanes": lambda f, v: f.shuffle(v(I32X4), v(I32X4), [8]),
    "extract of a scalar": lambda f, v: f.extract(v("i32"), 0),
    "extract beyond the lanes": lambda f, v: f.extract(v(I32X4), 4),
    "intrinsic of other types than before": lambda f, v: (
        f.intrinsic("llvm.x", "float", v("float")),
        f.intrinsic("llvm.x", "float", v("half")),
    ),
    "overload of two types": lambda f, v: f.overloaded("fma", v("float"), v("half"), v("float")),
    "call through an integer": lambda f, v: f.call_pointer(v("i64"), v("ptr")),
    "call with other types": lambda f, v: f.invoke(f, v("ptr")),
    "return of a value from void": lambda f, v: f.ret(v("i32")),
    "branch on an integer": lambda f, v: f.leave(v("i32"), "end"),
    "condition that is a vector": lambda f, v: f.when(v("<4 x i1>")).__enter__(),
    "loop up to a float": lambda f, v: f.loop(0, v("float")).__enter__(),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_raises_at_emission(f: Function, mistake: str) -> None:
    with pytest.raises(TypeError):
        MISTAKES[mistake](f, lambda kind: get(f, kind))


def test_a_function_that_gives_something_must_return_it() -> None:
    f = Module("test").function("f", "i32", [("x", "i64")])
    with pytest.raises(TypeError, match="@f gives i32, returns i64"):
        f.ret(f.parameters[0])
    with pytest.raises(TypeError, match="returns void"):
        f.ret()


def test_the_message_names_both_types(f: Function) -> None:
    with pytest.raises(TypeError, match="i32 beside i64"):
        get(f, "i32") + get(f, "i64")


def test_a_number_takes_the_type_of_its_neighbour(f: Function) -> None:
    assert (get(f, I32X4) + 3).type == I32X4
    assert (get(f, "half") * 0.5).type == "half"
    assert get(f, F32X4).compare("ogt", 0.0).type == "<4 x i1>"


def test_types_know_their_lanes_and_bytes() -> None:
    assert (lanes_of(F32X4), lanes_of("i64")) == (4, 1)
    assert (size_of(F32X4), size_of("ptr"), size_of("bfloat"), size_of("i8")) == (16, 8, 2, 1)


@pytest.mark.parametrize(
    ("kind", "value", "literal"),
    [
        ("float", 0.1, "0x3FB99999A0000000"),  # as LLVM writes floats: those bits as a double
        ("float", float("-inf"), "0xFFF0000000000000"),
        ("double", 0.1, "0x3FB999999999999A"),
        ("bfloat", 1.0, "0xR3F80"),
        ("i1", 1, "true"),
        ("i32", -7, "-7"),
    ],
)
def test_literals_keep_every_bit(f: Function, kind: str, value: float, literal: str) -> None:
    assert f.const(kind, value).text == literal


def test_nested_control_flow_is_valid(f: Function) -> None:
    """Blocks that Python nests are blocks that LLVM accepts."""
    total = f.variable("i64", 0)
    with f.loop(0, get(f, "i64")) as i:
        with f.when(get(f, "i1")), f.loop(i, 10, 2) as j:
            total.set(total.get() + j)
        with f.forever() as end:
            f.leave(total.get().compare("sgt", i), end)
            total.set(total.get() + 1)
    f.store(total.get(), get(f, "ptr"))
    f.ret()
    assert compile_object(str(f.module), pick_row())


def test_private_functions_are_internal_and_declared_once() -> None:
    module = Module("test")
    inner = module.function("inner", "float", [("x", "float")])
    inner.ret(inner.overloaded("fabs", inner.overloaded("fabs", inner.parameters[0])))
    outer = module.function("outer", "float", [("x", "float")], public=True)
    outer.ret(outer.invoke(inner, outer.parameters[0]))
    text = str(module)
    assert "define internal float @inner(float %x)" in text
    assert "define float @outer(float %x)" in text
    assert text.count("declare float @llvm.fabs.f32") == 1

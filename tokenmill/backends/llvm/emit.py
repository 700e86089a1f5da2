"""Writes LLVM IR as text, typed: a mismatch raises here, where the mistake is, not in LLVM.

Nesting in Python is nesting in IR: `with f.loop(0, n, 1) as i:` and `with f.when(cond):`.
Values that change in a loop live in a `Variable` (a stack slot, which LLVM turns into a
register). Pointers are opaque and advance in bytes. A Python number beside a value takes the
value's type.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

FLOATS = ("half", "bfloat", "float", "double")
_SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "ptr": 8}
_SIZES |= {"half": 2, "bfloat": 2, "float": 4, "double": 8}

_INTEGER, _FLOAT = "integer", "float"
_CASTS = {
    "zext": (_INTEGER, _INTEGER, 1),
    "sext": (_INTEGER, _INTEGER, 1),
    "trunc": (_INTEGER, _INTEGER, -1),
    "fpext": (_FLOAT, _FLOAT, 1),
    "fptrunc": (_FLOAT, _FLOAT, -1),
    "sitofp": (_INTEGER, _FLOAT, 0),
    "uitofp": (_INTEGER, _FLOAT, 0),
    "fptosi": (_FLOAT, _INTEGER, 0),
}
"""From what, to what, and whether the element grows (1), shrinks (-1) or may do either."""
_PREDICATES = {
    _INTEGER: ("eq", "ne", "slt", "sle", "sgt", "sge", "ult", "ule", "ugt", "uge"),
    _FLOAT: ("oeq", "ogt", "oge", "olt", "ole", "one", "ord", "uno", "une"),
}


def vector(element: str, lanes: int) -> str:
    """The type of `lanes` elements."""
    return f"<{lanes} x {element}>"


def element_of(kind: str) -> str:
    """The element of a vector type; a scalar type is its own."""
    return kind[1:-1].split(" x ")[1] if kind.startswith("<") else kind


def lanes_of(kind: str) -> int:
    """The lanes of a vector type; 1 for a scalar."""
    return int(kind[1:-1].split(" x ")[0]) if kind.startswith("<") else 1


def size_of(kind: str) -> int:
    """Bytes that a value of the type takes in memory."""
    return _SIZES[element_of(kind)] * lanes_of(kind)


def with_element(kind: str, element: str) -> str:
    """The same lanes, of another element."""
    return vector(element, lanes_of(kind)) if kind.startswith("<") else element


def _family(kind: str) -> str:
    """integer, float, or ptr."""
    element = element_of(kind)
    if element in FLOATS:
        return _FLOAT
    return _INTEGER if element.startswith("i") else element


def _bits(kind: str) -> int:
    element = element_of(kind)
    return 1 if element == "i1" else 8 * _SIZES[element]


def _literal(kind: str, value: float) -> str:
    if kind == "i1":
        return "true" if value else "false"
    if kind in FLOATS:
        return _float_literal(kind, value)
    return str(int(value))


def _float_literal(kind: str, value: float) -> str:
    if kind == "bfloat":
        return f"0xR{struct.unpack('<I', struct.pack('<f', value))[0] >> 16:04X}"
    exact = struct.unpack("<f", struct.pack("<f", value))[0] if kind == "float" else value
    return f"0x{struct.unpack('<Q', struct.pack('<d', exact))[0]:016X}"


@dataclass(frozen=True)
class Value:
    """An SSA value or a constant: its text and its type."""

    function: Function
    text: str
    type: str

    def _binary(self, other: Operand, integer: str, floating: str, swap: bool = False) -> Value:
        right = self.function.same(self, other)
        left, right = (right, self) if swap else (self, right)
        name = {_FLOAT: floating, _INTEGER: integer}.get(_family(self.type), "")
        if not name:
            raise TypeError(f"no {integer or floating} of {self.type}")
        return self.function.op(self.type, f"{name} {self.type} {left.text}, {right.text}")

    def __add__(self, other: Operand) -> Value:
        return self._binary(other, "add", "fadd")

    def __sub__(self, other: Operand) -> Value:
        return self._binary(other, "sub", "fsub")

    def __rsub__(self, other: Operand) -> Value:
        return self._binary(other, "sub", "fsub", swap=True)

    def __mul__(self, other: Operand) -> Value:
        return self._binary(other, "mul", "fmul")

    def __truediv__(self, other: Operand) -> Value:
        return self._binary(other, "", "fdiv")

    def __floordiv__(self, other: Operand) -> Value:
        return self._binary(other, "udiv", "")

    def divide_signed(self, other: Operand) -> Value:
        """Signed division, towards zero."""
        return self._binary(other, "sdiv", "")

    def __mod__(self, other: Operand) -> Value:
        return self._binary(other, "urem", "")

    def __and__(self, other: Operand) -> Value:
        return self._binary(other, "and", "")

    def __or__(self, other: Operand) -> Value:
        return self._binary(other, "or", "")

    def __xor__(self, other: Operand) -> Value:
        return self._binary(other, "xor", "")

    def __lshift__(self, other: Operand) -> Value:
        return self._binary(other, "shl", "")

    def __rshift__(self, other: Operand) -> Value:
        return self._binary(other, "lshr", "")

    def shift_signed(self, other: Operand) -> Value:
        """Arithmetic shift right."""
        return self._binary(other, "ashr", "")

    def compare(self, how: str, other: Operand) -> Value:
        """icmp or fcmp by type; `how` is eq ne slt sle sgt sge ult ule ugt uge oeq ogt ..."""
        right = self.function.same(self, other)
        family = _family(self.type)
        if how not in _PREDICATES.get(family, ()):
            raise TypeError(f"{self.type} cannot be compared by {how}")
        name = "fcmp" if family == _FLOAT else "icmp"
        kind = with_element(self.type, "i1")
        return self.function.op(kind, f"{name} {how} {self.type} {self.text}, {right.text}")

    def at(self, offset: Operand) -> Value:
        """This pointer, `offset` bytes on."""
        f = self.function
        if self.type != "ptr":
            raise TypeError(f"at: {self.type} is no pointer")
        step = f.const("i64", offset) if isinstance(offset, int) else f.widen(offset)
        return f.op("ptr", f"getelementptr i8, ptr {self.text}, i64 {step.text}")


Operand = Value | int | float


@dataclass(frozen=True)
class Variable:
    """A stack slot that holds one value."""

    function: Function
    text: str
    type: str

    def get(self) -> Value:
        return self.function.load(self.type, Value(self.function, self.text, "ptr"))

    def set(self, value: Operand) -> None:
        typed = value if isinstance(value, Value) else self.function.const(self.type, value)
        if typed.type != self.type:
            raise TypeError(f"variable of {self.type} set to {typed.type}")
        self.function.store(typed, Value(self.function, self.text, "ptr"))


class Module:
    """The functions of one object file and the intrinsics they declare."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.functions: list[Function] = []
        self.raw: list[str] = []
        self.declarations: dict[str, str] = {}

    def function(
        self, name: str, result: str, parameters: Sequence[tuple[str, str]], *, public: bool = False
    ) -> Function:
        """A new function; `parameters` are (name, type). Private ones are internal."""
        made = Function(self, name, result, parameters, public)
        self.functions.append(made)
        return made

    def declare(self, name: str, result: str, types: Sequence[str]) -> None:
        line = f"declare {result} @{name}({', '.join(types)})"
        if self.declarations.setdefault(name, line) != line:
            raise TypeError(f"@{name} declared twice: {line}")

    def constants(self, name: str, element: str, values: Sequence[float]) -> str:
        """A constant array in the object; returns its symbol."""
        inner = ", ".join(f"{element} {_literal(element, v)}" for v in values)
        self.raw.append(f"@{name} = internal constant [{len(values)} x {element}] [{inner}]")
        return f"@{name}"

    def __str__(self) -> str:
        defined = {f.name for f in self.functions}
        declared = [line for name, line in self.declarations.items() if name not in defined]
        return "\n".join([*declared, *self.raw, *(str(f) for f in self.functions)]) + "\n"


class Function:
    """One function under construction; every method appends at the end of the current block."""

    def __init__(
        self,
        module: Module,
        name: str,
        result: str,
        parameters: Sequence[tuple[str, str]],
        public: bool,
    ) -> None:
        self.module = module
        self.name = name
        self.result = result
        self.public = public
        self.parameters = [Value(self, f"%{n}", t) for n, t in parameters]
        self._slots: list[str] = []
        self._lines: list[str] = []
        self._count = 0
        self.attributes = "nounwind"

    def __str__(self) -> str:
        parameters = ", ".join(f"{p.type} {p.text}" for p in self.parameters)
        head = "define" if self.public else "define internal"
        lines = [
            f"{head} {self.result} @{self.name}({parameters}) {self.attributes} {{",
            "entry:",
            *self._slots,
            *self._lines,
            "}",
        ]
        return "\n".join(lines)

    # -- the plumbing

    def fresh(self, stem: str = "") -> str:
        self._count += 1
        return f"{stem}{self._count}"

    def line(self, text: str) -> None:
        self._lines.append(f"  {text}")

    def op(self, kind: str, text: str) -> Value:
        name = f"%{self.fresh('v')}"
        self.line(f"{name} = {text}")
        return Value(self, name, kind)

    def const(self, kind: str, value: float) -> Value:
        """A constant; a vector type gives the same number in every lane."""
        literal = _literal(element_of(kind), value)
        if not kind.startswith("<"):
            return Value(self, literal, kind)
        return Value(self, f"splat ({element_of(kind)} {literal})", kind)

    def lanes(self, kind: str, values: Sequence[float]) -> Value:
        """A constant vector of these lanes."""
        if len(values) != lanes_of(kind):
            raise TypeError(f"{len(values)} lanes for {kind}")
        element = element_of(kind)
        inner = ", ".join(f"{element} {_literal(element, v)}" for v in values)
        return Value(self, f"<{inner}>", kind)

    def same(self, like: Value, other: Operand) -> Value:
        """`other` as a value of the type of `like`."""
        if not isinstance(other, Value):
            return self.const(like.type, other)
        if other.type != like.type:
            raise TypeError(f"{like.type} beside {other.type}")
        return other

    def variable(self, kind: str, start: Operand | None = None) -> Variable:
        name = f"%{self.fresh('slot')}"
        self._slots.append(f"  {name} = alloca {kind}, align {min(64, size_of(kind))}")
        made = Variable(self, name, kind)
        if start is not None:
            made.set(start)
        return made

    # -- memory

    def load(self, kind: str, pointer: Value, align: int | None = None) -> Value:
        """Load; `align` in bytes defaults to the element's size."""
        if pointer.type != "ptr":
            raise TypeError(f"load from {pointer.type}")
        align = align or size_of(element_of(kind))
        return self.op(kind, f"load {kind}, ptr {pointer.text}, align {align}")

    def store(self, value: Value, pointer: Value, align: int | None = None) -> None:
        if pointer.type != "ptr":
            raise TypeError(f"store to {pointer.type}")
        align = align or size_of(element_of(value.type))
        self.line(f"store {value.type} {value.text}, ptr {pointer.text}, align {align}")

    def prefetch(self, pointer: Value) -> None:
        """Ask for a cache line, into the second level."""
        hints = [self.const("i32", hint) for hint in (0, 2, 1)]  # read, second level, data
        self.intrinsic("llvm.prefetch.p0", "void", pointer, *hints)

    def atomic_add(self, pointer: Value, amount: Value) -> Value:
        """Add and return the old value; relaxed, for handing out work items."""
        if pointer.type != "ptr" or _family(amount.type) != _INTEGER or lanes_of(amount.type) > 1:
            raise TypeError(f"atomic add of {amount.type} to {pointer.type}")
        text = f"atomicrmw add ptr {pointer.text}, {amount.type} {amount.text} monotonic"
        return self.op(amount.type, text)

    # -- arithmetic

    def cast(self, how: str, value: Value, element: str) -> Value:
        """zext sext trunc fptrunc fpext sitofp uitofp fptosi: the same lanes of `element`."""
        kind = with_element(value.type, element)
        source, target, growth = _CASTS[how]
        grown = _bits(kind) - _bits(value.type)
        fits = (_family(value.type), _family(kind)) == (source, target)
        if not fits or grown * growth < abs(growth):
            raise TypeError(f"{how} {value.type} to {kind}")
        return self.op(kind, f"{how} {value.type} {value.text} to {kind}")

    def bitcast(self, value: Value, kind: str) -> Value:
        if size_of(value.type) != size_of(kind):
            raise TypeError(f"bitcast {value.type} to {kind}")
        return self.op(kind, f"bitcast {value.type} {value.text} to {kind}")

    def widen(self, value: Operand) -> Value:
        """An i32 or a Python int as i64."""
        if not isinstance(value, Value):
            return self.const("i64", value)
        if value.type == "i64":
            return value
        return self.cast("sext", value, "i64")

    def select(self, condition: Value, yes: Operand, no: Operand) -> Value:
        typed = yes if isinstance(yes, Value) else self.same(_value(no), yes)
        other = self.same(typed, no)
        if condition.type not in ("i1", with_element(typed.type, "i1")):
            raise TypeError(f"select between {typed.type} by {condition.type}")
        text = f"select {condition.type} {condition.text}, {typed.type} {typed.text}, "
        return self.op(typed.type, text + f"{other.type} {other.text}")

    def splat(self, value: Value, lanes: int) -> Value:
        """One scalar in every lane."""
        if lanes_of(value.type) > 1:
            raise TypeError(f"splat of {value.type}")
        kind = vector(value.type, lanes)
        one = self.op(kind, f"insertelement {kind} poison, {value.type} {value.text}, i64 0")
        return self.shuffle(one, one, [0] * lanes)

    def shuffle(self, a: Value, b: Value, indices: Sequence[int]) -> Value:
        if a.type != b.type:
            raise TypeError(f"shuffle of {a.type} and {b.type}")
        if not all(0 <= i < 2 * lanes_of(a.type) for i in indices):
            raise TypeError(f"shuffle of two {a.type} with lanes {list(indices)}")
        mask = ", ".join(f"i32 {i}" for i in indices)
        kind = vector(element_of(a.type), len(indices))
        text = (
            f"shufflevector {a.type} {a.text}, {b.type} {b.text}, <{len(indices)} x i32> <{mask}>"
        )
        return self.op(kind, text)

    def extract(self, value: Value, lane: int) -> Value:
        if not (value.type.startswith("<") and 0 <= lane < lanes_of(value.type)):
            raise TypeError(f"lane {lane} of {value.type}")
        text = f"extractelement {value.type} {value.text}, i64 {lane}"
        return self.op(element_of(value.type), text)

    def intrinsic(self, name: str, result: str, *arguments: Value) -> Value:
        """Call an intrinsic; its types are checked against the first declaration."""
        self.module.declare(name, result, [a.type for a in arguments])
        return self.call(name, result, *arguments)

    def overloaded(self, name: str, *arguments: Value) -> Value:
        """Call `llvm.NAME` in the form for these operands' common type."""
        kind = arguments[0].type
        for argument in arguments:
            self.same(arguments[0], argument)
        short = {"float": "f32", "half": "f16", "bfloat": "bf16"}
        element = short.get(element_of(kind), element_of(kind))
        suffix = f"v{lanes_of(kind)}{element}" if kind.startswith("<") else element
        return self.intrinsic(f"llvm.{name}.{suffix}", kind, *arguments)

    # -- calls and control flow

    def call(self, name: str, result: str, *arguments: Value) -> Value:
        text = f"call {result} @{name}({', '.join(f'{a.type} {a.text}' for a in arguments)})"
        if result == "void":
            self.line(text)
            return Value(self, "", "void")
        return self.op(result, text)

    def call_pointer(self, pointer: Value, *arguments: Value) -> None:
        """Call through a pointer to a function without result."""
        if pointer.type != "ptr":
            raise TypeError(f"call through {pointer.type}")
        inner = ", ".join(f"{a.type} {a.text}" for a in arguments)
        self.line(f"call void {pointer.text}({inner})")

    def invoke(self, callee: Function, *arguments: Value) -> Value:
        """Call a function of this module, its parameter types checked."""
        wanted = [p.type for p in callee.parameters]
        given = [a.type for a in arguments]
        if wanted != given:
            raise TypeError(f"@{callee.name} takes {wanted}, given {given}")
        return self.call(callee.name, callee.result, *arguments)

    def ret(self, value: Value | None = None) -> None:
        given = "void" if value is None else value.type
        if given != self.result:
            raise TypeError(f"@{self.name} gives {self.result}, returns {given}")
        self.line("ret void" if value is None else f"ret {value.type} {value.text}")

    def label(self, name: str) -> None:
        self._lines.append(f"{name}:")

    @contextmanager
    def loop(self, start: Operand, stop: Value | int, step: Value | int = 1) -> Iterator[Value]:
        """`for i in range(start, stop, step)`, i an i64; the body may be empty of iterations."""
        tag = self.fresh("loop")
        end = self.widen(stop)
        counter = self.variable("i64", self.widen(start))
        self.line(f"br label %{tag}.test")
        self.label(f"{tag}.test")
        index = counter.get()
        go = index.compare("slt", end)
        self.line(f"br i1 {go.text}, label %{tag}.body, label %{tag}.end")
        self.label(f"{tag}.body")
        yield index
        counter.set(index + step)
        self.line(f"br label %{tag}.test")
        self.label(f"{tag}.end")

    @contextmanager
    def forever(self) -> Iterator[str]:
        """A loop left by `leave(label)`; yields that label."""
        tag = self.fresh("forever")
        self.line(f"br label %{tag}.body")
        self.label(f"{tag}.body")
        yield f"{tag}.end"
        self.line(f"br label %{tag}.body")
        self.label(f"{tag}.end")

    def leave(self, condition: Value, label: str) -> None:
        """Jump to `label` when the condition holds."""
        _require_condition(condition)
        stay = self.fresh("stay")
        self.line(f"br i1 {condition.text}, label %{label}, label %{stay}")
        self.label(stay)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """`if condition:`"""
        _require_condition(condition)
        tag = self.fresh("when")
        self.line(f"br i1 {condition.text}, label %{tag}.yes, label %{tag}.end")
        self.label(f"{tag}.yes")
        yield
        self.line(f"br label %{tag}.end")
        self.label(f"{tag}.end")


def _require_condition(condition: Value) -> None:
    if condition.type != "i1":
        raise TypeError(f"a branch on {condition.type}")


def _value(operand: Operand) -> Value:
    if isinstance(operand, Value):
        return operand
    raise TypeError("one side of a select must be a typed value")

"""Epilogues: what is done with results while they are in registers.

Every phase computes a value 2 * LANES features at a time and hands the pair of vectors to an
`Epilogue`, which runs the rest of the fused node on it and stores what is visible outside.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi, sqrt

from tokenmill.backends.llvm.emit import Value
from tokenmill.backends.llvm.kv_cache import (
    Pair,
    quantize_pair,
    store_keys,
    store_values,
    token_head,
)
from tokenmill.backends.llvm.lanes import F32, I32
from tokenmill.backends.llvm.packing import PAIR_ROWS
from tokenmill.backends.llvm.scope import Scope
from tokenmill.ir.graph import Node
from tokenmill.ir.order import GROUP, LANES, padded_head

_VECTOR_BYTES = 4 * LANES


def load_pair(scope: Scope, row: Value, pair: Value) -> Pair:
    """Features [32 pair, 32 pair + 32) of a float32 row."""
    start = row.at(pair * (2 * _VECTOR_BYTES))
    return scope.f.load(F32, start, 4), scope.f.load(F32, start.at(_VECTOR_BYTES), 4)


def load_value(
    scope: Scope, name: str, row: Value, pair: Value, beyond: Value | float = 0.0
) -> Pair:
    """A pair of a value that lies in memory; features beyond its true width are `beyond`."""
    low, high = load_pair(scope, scope.row_address(name, row), pair)
    width = scope.types[name].width
    if width % PAIR_ROWS == 0:
        return low, high
    f = scope.f
    left = scope.lanes.splat(f.cast("trunc", f.const("i64", width) - pair * PAIR_ROWS, "i32"))
    masks = [f.lanes(I32, range(i, i + LANES)).compare("slt", left) for i in (0, LANES)]
    return f.select(masks[0], low, beyond), f.select(masks[1], high, beyond)


def store_pair(scope: Scope, values: Pair, row: Value, pair: Value) -> None:
    start = row.at(pair * (2 * _VECTOR_BYTES))
    scope.f.store(values[0], start, 4)
    scope.f.store(values[1], start.at(_VECTOR_BYTES), 4)


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """The nodes that follow in a fused node, and the names that others see."""

    nodes: Sequence[Node]
    visible: frozenset[str]

    def run(self, scope: Scope, made: dict[str, Pair], row: Value, pair: Value) -> None:
        """Run on one pair of one row; `made` holds the values computed so far."""
        made = dict(made)
        for name in self.visible & made.keys():
            _store(scope, name, made[name], row, pair)
        for node in self.nodes:
            if node.op == "kv_write":
                _write_cache(scope, node, made, row, pair)
                continue
            values = self._compute(scope, node, made, row, pair)
            made[node.result.name] = values
            if node.result.name in self.visible:
                _store(scope, node.result.name, values, row, pair)

    def _compute(
        self, scope: Scope, node: Node, made: dict[str, Pair], row: Value, pair: Value
    ) -> Pair:
        operands = [_operand(scope, name, made, row, pair) for name in node.operands[:2]]
        match node.op:
            case "add":
                [a, b] = operands
                return a[0] + b[0], a[1] + b[1]
            case "mul":
                [a, b] = operands
                return a[0] * b[0], a[1] * b[1]
            case "silu" | "gelu" | "gelu_erf" | "scale" | "softcap":
                return _unary(scope, node, operands[0][0]), _unary(scope, node, operands[0][1])
            case "rope":
                return _rope(scope, node, operands[0], row, pair)
            case "round":
                return operands[0]
        raise ValueError(f"{node.op} is no epilogue")


def _operand(scope: Scope, name: str, made: dict[str, Pair], row: Value, pair: Value) -> Pair:
    if name in made:
        return made[name]
    if name not in scope.buffers:
        return scope.lanes.zero(), scope.lanes.zero()  # a handle, which no arithmetic reads
    return load_value(scope, name, row, pair)


def _unary(scope: Scope, node: Node, x: Value) -> Value:
    match node.op:
        case "silu":
            return _gated(scope, x, x)
        case "gelu":  # see numerics.gelu
            cubed = x * x * x
            inner = (x + cubed * 0.044715) * sqrt(2 / pi)
            return _gated(scope, x, inner * 2.0)
        case "gelu_erf":
            return x * scope.lanes.normal_cdf(x)
        case "scale":
            return x * node.real("by")
        case _:
            return scope.lanes.softcap(x, node.real("cap"))


def _gated(scope: Scope, x: Value, gate: Value) -> Value:
    """x * sigmoid(gate)."""
    one = scope.f.const(F32, 1.0)
    lanes = scope.lanes
    negative = scope.f.const(F32, 0.0) - gate
    bounded = scope.f.select(negative.compare("ogt", 88.0), scope.f.const(F32, 88.0), negative)
    return x / (one + lanes.exp(bounded))


def _rope(scope: Scope, node: Node, x: Pair, row: Value, pair: Value) -> Pair:
    """Stored heads alternate vectors of their two halves, so a pair turns in place."""
    f, lanes = scope.f, scope.lanes
    head_dim = node.integer("head_dim")
    half_bytes = 2 * padded_head(head_dim)
    table = scope.angles(node)
    position = f.widen(scope.element("positions", row))
    in_head = pair % (padded_head(head_dim) // PAIR_ROWS)
    start = table.at(position * (2 * half_bytes)).at(in_head * _VECTOR_BYTES)
    cos, sin = f.load(F32, start), f.load(F32, start.at(half_bytes))
    low = lanes.fma(x[0], cos, f.const(F32, -0.0) - x[1] * sin)
    high = lanes.fma(x[1], cos, x[0] * sin)
    return low, high


def _store(scope: Scope, name: str, values: Pair, row: Value, pair: Value) -> None:
    address = scope.row_address(name, row)
    if scope.types[name].dtype != "f32":
        store_rounded(scope, name, values, address, pair)
        return
    store_pair(scope, values, address, pair)
    if name in scope.summed:
        sums = address.at(scope.buffers[name].record.sums)
        scope.f.store(scope.lanes.tree(values[0] + values[1]), sums.at(pair * 4))


def store_rounded(scope: Scope, name: str, values: Pair, row: Value, pair: Value) -> None:
    """Round one group and store it with its sum (and for int8 its scale); see tiles.Record."""
    record = scope.buffers[name].record
    rounded = _round_bf16 if record.dtype == "bf16" else _round_int8
    rounded(scope, name, values, row, pair)


def _round_bf16(scope: Scope, name: str, values: Pair, row: Value, pair: Value) -> None:
    f, lanes = scope.f, scope.lanes
    start = row.at(pair * (2 * GROUP))
    narrow = [lanes.f32_to_bf16(v) for v in values]
    f.store(narrow[0], start)
    f.store(narrow[1], start.at(2 * LANES))
    if name in scope.summed:
        low, high = (lanes.bf16_to_f32(v) for v in narrow)
        record = scope.buffers[name].record
        f.store(lanes.tree(low + high), row.at(record.sums).at(pair * 4))


def _round_int8(scope: Scope, name: str, values: Pair, row: Value, pair: Value) -> None:
    f, lanes = scope.f, scope.lanes
    record = scope.buffers[name].record
    integers, scale = quantize_pair(lanes, values)
    start = row.at(pair * GROUP)
    for index, integer in enumerate(integers):
        f.store(f.cast("trunc", integer, "i8"), start.at(index * LANES))
    halves = [lanes.tree(integer) for integer in integers]
    total = halves[0] + halves[1]
    f.store(f.cast("sitofp", total, "float") * scale, row.at(record.sums).at(pair * 4))
    f.store(scale, row.at(record.scales).at(pair * 4))
    f.store(total * -128, row.at(record.starts).at(pair * 4))
    for index, half in enumerate(halves):
        f.store(half * -32, row.at(record.halves).at(pair * 8).at(index * 4))


def _write_cache(scope: Scope, node: Node, made: dict[str, Pair], row: Value, pair: Value) -> None:
    """Store what this part of the node made: keys or values of one token."""
    keys, values = node.operands[:2]
    head_dim, to = node.integer("head_dim"), node.string("to")
    pairs = padded_head(head_dim) // PAIR_ROWS
    head, in_head = pair // pairs, pair % pairs
    if keys in made:
        place = token_head(scope, "keys", row, head, node)
        store_keys(scope, made[keys], place, in_head, row, to)
    if values in made:
        place = token_head(scope, "values", row, head, node)
        store_values(scope, made[values], place, in_head, row, head_dim, to)

"""What adapters add to a linear: A x as a phase of its own, B (A x) while results are in registers.

A row without an adapter, or whose adapter leaves the linear as it is, is not touched: its bits
are those of the model itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from tokenmill.backends.llvm.emit import Value, vector
from tokenmill.backends.llvm.factors import HEADER_BYTES, ROWS_AT_ONCE, Factor
from tokenmill.backends.llvm.kv_cache import Pair
from tokenmill.backends.llvm.lanes import F32, I16
from tokenmill.backends.llvm.packing import PAIR_ROWS, RowOrder, round_up
from tokenmill.backends.llvm.scope import Scope, Slot, pairs_of
from tokenmill.ir.graph import Node
from tokenmill.ir.order import GROUP, LANES
from tokenmill.passes.add_adapters import A, B


def lower_shrink(scope: Scope, node: Node) -> None:
    """A x. Threads share the rows of x, and for each of them the rows of A."""
    f, lanes = scope.f, scope.lanes
    x, weight, _ = node.operands
    slots, rank, k = map(int, scope.types[weight].shape)
    factor = Factor(
        weight=weight.removesuffix(A),
        dtype=scope.types[weight].dtype,
        slots=slots,
        rank=rank,
        width=round_up(k, PAIR_ROWS),
    )
    base = scope.weight(Slot(name=weight, factor=factor))
    parts = factor.stored_rank // ROWS_AT_ONCE
    with scope.share(scope.count(x) * parts) as item:
        row, first = item // parts, (item % parts) * ROWS_AT_ONCE
        with _adapter(scope, factor, base, row) as (start, own), f.when(first.compare("slt", own)):
            matrix = start.at(first * factor.row_bytes)
            sums = [f.variable(F32, 0.0) for _ in range(ROWS_AT_ONCE)]
            with f.loop(0, pairs_of(scope.buffers[x])) as pair:
                values = load_activations(scope, x, row, pair)
                for index, total in enumerate(sums):
                    place = matrix.at(index * factor.row_bytes)
                    weights = _load_pair(scope, factor, place, pair)
                    for a, value in zip(weights, values, strict=True):
                        total.set(lanes.fma(a, value, total.get()))
            out = scope.row_address(node.result.name, row).at(first * 4)
            for index, total in enumerate(sums):
                f.store(lanes.tree(total.get()), out.at(4 * index))


def expanded(scope: Scope, node: Node, y: Pair, row: Value, pair: Value, order: RowOrder) -> Pair:
    """y + B (A x) for one pair of outputs, stored in `order`."""
    f, lanes = scope.f, scope.lanes
    _, low, weight, _ = node.operands
    slots, _, rank = map(int, scope.types[weight].shape)
    factor = Factor(
        weight=weight.removesuffix(B),
        dtype=scope.types[weight].dtype,
        slots=slots,
        rank=rank,
        width=order.width,
        order=order,
    )
    base = scope.weight(Slot(name=weight, factor=factor))
    results = [f.variable(F32, half) for half in y]
    with _adapter(scope, factor, base, row) as (start, own), f.when(own.compare("sgt", 0)):
        panel = start.at(pair * factor.pair_bytes)
        source = scope.row_address(low, row)
        sums = [f.variable(F32, 0.0) for _ in y]
        with f.loop(0, own) as index:
            scalar = lanes.splat(f.load("float", source.at(index * 4)))
            for b, total in zip(_load_pair(scope, factor, panel, index), sums, strict=True):
                total.set(lanes.fma(b, scalar, total.get()))
        for result, total in zip(results, sums, strict=True):
            result.set(result.get() + total.get())
    return results[0].get(), results[1].get()


@contextmanager
def _adapter(
    scope: Scope, factor: Factor, base: Value, row: Value
) -> Iterator[tuple[Value, Value]]:
    """Where the matrix of a row's adapter starts, and its rank; skipped for a row without one."""
    f = scope.f
    slot = f.widen(scope.element("adapters", row))
    with f.when(slot.compare("sge", 0)):
        start = base.at(slot * factor.slot_bytes)
        yield start.at(HEADER_BYTES), f.widen(f.load("i32", start))


def _load_pair(scope: Scope, factor: Factor, start: Value, index: Value) -> Pair:
    """The pair of vectors at an index of a row or panel, as float32."""
    size = factor.element.itemsize
    place = start.at(index * (size * PAIR_ROWS))
    low, high = place, place.at(size * LANES)
    if size == 4:
        return scope.f.load(F32, low), scope.f.load(F32, high)
    return _load_bf16(scope, low), _load_bf16(scope, high)


def _load_bf16(scope: Scope, place: Value) -> Value:
    return scope.lanes.bf16_to_f32(scope.f.load(I16, place, 2))


def load_activations(scope: Scope, name: str, row: Value, pair: Value) -> Pair:
    """A group of a rounded row, as float32; see tiles.Record."""
    f, lanes, record = scope.f, scope.lanes, scope.buffers[name].record
    address = scope.row_address(name, row)
    if record.dtype == "f32":
        start = address.at(pair * (4 * GROUP))
        return f.load(F32, start, 4), f.load(F32, start.at(4 * LANES), 4)
    if record.dtype == "bf16":
        start = address.at(pair * (2 * GROUP))
        return _load_bf16(scope, start), _load_bf16(scope, start.at(2 * LANES))
    start = address.at(pair * GROUP)
    scale = lanes.splat(f.load("float", address.at(record.scales).at(pair * 4)))
    integers = (f.load(vector("i8", LANES), start.at(LANES * half), 1) for half in range(2))
    low, high = (f.cast("sitofp", f.cast("sext", i, "i32"), "float") * scale for i in integers)
    return low, high

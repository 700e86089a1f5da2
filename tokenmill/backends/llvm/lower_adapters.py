"""What adapters add to a linear: A x as a phase of its own, B (A x) while results are at hand.

Rows that lie together and have one adapter are a run, and are multiplied together. A row without
an adapter, or whose adapter leaves the linear as it is, keeps the bits of the model itself.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from tokenmill.backends.llvm.emit import Function, Value, Variable, vector
from tokenmill.backends.llvm.factors import HEADER_BYTES, RANKS_AT_ONCE, Factor
from tokenmill.backends.llvm.kv_cache import Pair
from tokenmill.backends.llvm.lanes import F32, I16, I32, clamp
from tokenmill.backends.llvm.packing import PAIR_ROWS, RowOrder, round_up
from tokenmill.backends.llvm.scope import Scope, Slot, pairs_of
from tokenmill.backends.llvm.tiles import ROW_BYTES
from tokenmill.ir.graph import Node
from tokenmill.ir.order import GROUP, LANES
from tokenmill.passes.add_adapters import A, B

_LINE = 64  # bytes


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Rows [first, last) of one adapter: its rank, and where its matrix starts."""

    first: Value
    last: Value
    rank: Value
    matrix: Value

    def tiles(self, f: Function, sizes: Sequence[int]) -> Iterator[tuple[Value, int]]:
        """Loop over all rows by tiles of the first size, what is left by the next, ..., by 1.

        Gives the first row of a tile, and how many it has.
        """
        start = self.first
        for size in dict.fromkeys((*sizes, 1)):
            with f.loop(start, self.last - (size - 1), size) as row:
                yield row, size
            start = self.last - (self.last - start) % size


@contextmanager
def _runs(scope: Scope, factor: Factor, base: Value, first: Value, stop: Value) -> Iterator[_Run]:
    """Loop over the runs of rows [first, stop) that have an adapter."""
    f = scope.f
    row = f.variable("i64", first)
    with f.forever() as done:
        start = row.get()
        f.leave(start.compare("sge", stop), done)
        slot = scope.element("adapters", start)
        row.set(start + 1)
        with f.forever() as ended:
            f.leave(row.get().compare("sge", stop), ended)
            f.leave(scope.element("adapters", row.get()).compare("ne", slot), ended)
            row.set(row.get() + 1)
        with f.when(slot.compare("sge", 0)):
            header = base.at(f.widen(slot) * factor.slot_bytes)
            rank = f.widen(f.load("i32", header))
            yield _Run(first=start, last=row.get(), rank=rank, matrix=header.at(HEADER_BYTES))


def lower_shrink(scope: Scope, node: Node) -> None:
    """A x, rounded. Threads share the runs of A's ranks, and for each of them the rows of x."""
    f, size = scope.f, max(1, scope.row.tile_rows // 4)
    x, weight, _ = node.leaves[0].operands
    slots, rank, k = map(int, scope.types[weight].shape)
    factor = Factor(
        weight=weight.removesuffix(A),
        dtype=scope.types[weight].dtype,
        slots=slots,
        rank=rank,
        width=round_up(k, PAIR_ROWS),
    )
    base = scope.weight(Slot(name=weight, factor=factor))
    total = scope.count(x)
    tiles = (total + (size - 1)) // size
    with scope.share(tiles * factor.parts[0]) as item:
        part, first = item // tiles, item % tiles * size
        stop = clamp(f, first + size, 0, total)
        with (
            _runs(scope, factor, base, first, stop) as run,
            f.when((part * RANKS_AT_ONCE).compare("slt", run.rank)),
        ):
            matrix = run.matrix.at(part * factor.part_bytes)
            for row, count in run.tiles(f, (size,)):
                for index, sums in enumerate(_dots(scope, factor, x, matrix, row, count)):
                    _store_ranks(scope, node.results[0].name, row + index, part, sums)


def _dots(
    scope: Scope, factor: Factor, x: str, matrix: Value, first: Value, count: int
) -> list[list[Variable]]:
    """The dots of `count` rows of x with a run of A's ranks, lane by lane."""
    f, size = scope.f, factor.element.itemsize * PAIR_ROWS
    is_native = scope.buffers[x].record.dtype == "bf16" and factor.dtype == "lora16"
    sums = [[f.variable(F32, 0.0) for _ in range(RANKS_AT_ONCE)] for _ in range(count)]
    with f.loop(0, pairs_of(scope.buffers[x])) as pair:
        load_x = _load_words if is_native else load_activations
        values = [load_x(scope, x, first + i, pair) for i in range(count)]
        start = matrix.at(pair * (RANKS_AT_ONCE * size))
        for rank in range(RANKS_AT_ONCE):
            place = start.at(rank * size)
            weights = (f.load(I32, place),) if is_native else _load_floats(scope, factor, place)
            for totals, value in zip(sums, values, strict=True):
                _add_products(scope, totals[rank], weights, value)
    return sums


def _add_products(scope: Scope, total: Variable, a: Sequence[Value], b: Sequence[Value]) -> None:
    """Vectors of float32, or of 32-bit lanes that hold a pair of bfloat16 each."""
    for x, y in zip(a, b, strict=True):
        if x.type == F32:
            total.set(scope.lanes.fma(x, y, total.get()))
        else:
            total.set(scope.lanes.dot_bf16(total.get(), x, y))


def _store_ranks(scope: Scope, name: str, row: Value, part: Value, sums: list[Variable]) -> None:
    """Add up and store one run of ranks of one row."""
    f, lanes = scope.f, scope.lanes
    ranks = lanes.trees([total.get() for total in sums])
    out = scope.row_address(name, row)
    if scope.types[name].dtype == "f32":
        f.store(ranks, out.at(part * (4 * RANKS_AT_ONCE)))
        return
    filled = f.shuffle(ranks, ranks, [i % RANKS_AT_ONCE for i in range(LANES)])
    narrow = lanes.f32_to_bf16(filled)
    f.store(f.shuffle(narrow, narrow, range(RANKS_AT_ONCE)), out.at(part * (2 * RANKS_AT_ONCE)))


class Expansion:
    """B (A x) of one linear, which a tile's results are changed by before they are used."""

    def __init__(self, scope: Scope, node: Node, order: RowOrder) -> None:
        """`node` is an expand, `order` that in which its linear's outputs are stored."""
        self._scope = scope
        self._node = node
        slots, _, rank = map(int, scope.types[node.operands[2]].shape)
        self._factor = Factor(
            weight=node.operands[2].removesuffix(B),
            dtype=scope.types[node.operands[2]].dtype,
            slots=slots,
            rank=rank,
            width=order.width,
            order=order,
        )

    @cached_property
    def compute(self) -> Function:
        """`expand(context, weights, layer, pair, row, stop, out)`: rows [row, stop) of a pair.

        Rows lie in `out` as in a tile's; those without an adapter are left out.
        """
        scope = self._function("expand", ("out", "ptr"))
        f, first, out = scope.f, scope.f.parameters[4], scope.f.parameters[6]
        with self._panels(scope) as run:
            for row, count in run.tiles(f, (scope.row.tile_rows, scope.row.wide_rows)):
                for index, sums in enumerate(self._sums(scope, run, row, count)):
                    place = out.at((row + index - first) * ROW_BYTES)
                    f.store(sums[0].get(), place, 64)
                    f.store(sums[1].get(), place.at(4 * LANES), 64)
        f.ret()
        return f

    @cached_property
    def fetch(self) -> Function:
        """`fetch(context, weights, layer, pair, row, stop)`: ask for B, to have it in time."""
        scope = self._function("fetch")
        size = self._factor.element.itemsize * PAIR_ROWS
        with (
            self._panels(scope) as run,
            scope.f.loop(0, run.rank * size, _LINE) as line,
        ):
            scope.f.prefetch(run.matrix.at(line))
        scope.f.ret()
        return scope.f

    def _function(self, name: str, *others: tuple[str, str]) -> Scope:
        """The scope of a new function of this linear's."""
        outside = self._scope
        parameters = [("context", "ptr"), ("weights", "ptr"), ("layer", "i64")]
        parameters += [(n, "i64") for n in ("pair", "row", "stop")]
        full_name = f"{outside.f.name}.{self._node.result.name[1:]}.{name}"
        f = outside.module.function(full_name, "void", [*parameters, *others])
        return outside.within(f, *f.parameters[:3])

    @contextmanager
    def _panels(self, scope: Scope) -> Iterator[_Run]:
        """The runs of the function's rows, each with its adapter's panel of the pair."""
        pair, first, stop = scope.f.parameters[3:6]
        base = scope.weight(Slot(name=self._node.operands[2], factor=self._factor))
        with _runs(scope, self._factor, base, first, stop) as run:
            yield replace(run, matrix=run.matrix.at(pair * self._factor.part_bytes))

    def _sums(self, scope: Scope, run: _Run, row: Value, count: int) -> list[list[Variable]]:
        """B (A x) of `count` rows, both halves of a pair; at rank 0, what changes no bit."""
        f, factor = scope.f, self._factor
        kind = "float" if factor.neighbours == 1 else "i32"
        low = [scope.row_address(self._node.operands[1], row + i) for i in range(count)]
        sums = [[f.variable(F32, -0.0) for _ in range(2)] for _ in range(count)]
        steps = (run.rank + (factor.neighbours - 1)) // factor.neighbours
        with f.loop(0, steps) as step:
            panel = run.matrix.at(step * (8 * LANES))
            vectors = [f.load(vector(kind, LANES), panel.at(i * 4 * LANES)) for i in range(2)]
            for totals, start in zip(sums, low, strict=True):
                value = scope.lanes.splat(f.load(kind, start.at(step * 4)))
                for total, b in zip(totals, vectors, strict=True):
                    _add_products(scope, total, [b], [value])
        return sums


def add_expansion(scope: Scope, y: Pair, row: Value, place: Value) -> Pair:
    """y and what an Expansion computed for it, if the row has an adapter."""
    f = scope.f
    results = [f.variable(F32, half) for half in y]
    with f.when(scope.element("adapters", row).compare("sge", 0)):
        for index, result in enumerate(results):
            result.set(result.get() + f.load(F32, place.at(index * 4 * LANES), 64))
    return results[0].get(), results[1].get()


def _load_words(scope: Scope, name: str, row: Value, pair: Value) -> Sequence[Value]:
    """A group of a row of bfloat16, a pair in each 32-bit lane."""
    return (scope.f.load(I32, scope.row_address(name, row).at(pair * (2 * GROUP))),)


def _load_floats(scope: Scope, factor: Factor, place: Value) -> Pair:
    """32 numbers of a factor, as float32."""
    size = factor.element.itemsize
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

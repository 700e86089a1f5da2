"""Linears: threads share the output pairs, and walk theirs tile by tile of rows.

A fused node may hold several linears. Those whose results meet in the epilogue (gate and up) are
walked together; the others (q, k, v) one after another. While rows are few, each thread has a
share of its own, cut by cost, so that all finish together whatever the mix of sizes and formats.
With many rows threads draw small items, a pair over some tiles of rows, from a counter: whoever
is slower, or is held up by other work on its processor, does less.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tokenmill.backends.llvm.emit import Function, Value, vector
from tokenmill.backends.llvm.epilogue import Epilogue
from tokenmill.backends.llvm.kv_cache import Pair
from tokenmill.backends.llvm.lanes import F32, clamp
from tokenmill.backends.llvm.lower_adapters import Expansion, add_expansion
from tokenmill.backends.llvm.packing import PACKINGS, PAIR_ROWS, RowOrder
from tokenmill.backends.llvm.scope import Scope, Slot
from tokenmill.backends.llvm.target import MOST_TILE_ROWS
from tokenmill.backends.llvm.tiles import ROW_BYTES, Tile
from tokenmill.ir.graph import Node
from tokenmill.ir.order import GROUP, LANES

LINEARS = ("linear", "expert_linear")

_ITEM_INPUTS = 64 * 1024
"""Rows times inputs of an item: some ten microseconds of work, which a draw is nothing against."""


Range = tuple[Value, Value]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Linears walked together, over the same output pairs, and what follows them.

    `expands` are what adapters add to some of the linears, by those linears' results.
    """

    linears: tuple[Node, ...]
    expands: Mapping[str, Node]
    order: RowOrder
    epilogue: Epilogue

    @property
    def pairs(self) -> int:
        return self.order.width // PAIR_ROWS


def segments_of(node: Node, orders: dict[str, RowOrder]) -> list[Segment]:
    """Cut a node at the linears whose results never meet; `orders` gives stored orders."""
    leaves = node.leaves
    visible = frozenset(v.name for v in node.results)
    linears = [leaf for leaf in leaves if leaf.op in LINEARS]
    parts: list[tuple[list[Node], set[str]]] = []
    for linear in linears:
        reached = _reached(linear, leaves)
        met = [p for p in parts if p[1] & reached]
        parts = [p for p in parts if not p[1] & reached]
        parts.append(
            ([n for p in met for n in p[0]] + [linear], reached.union(*(p[1] for p in met)))
        )
    return [_segment(members, reached, leaves, visible, orders) for members, reached in parts]


def _reached(linear: Node, leaves: Sequence[Node]) -> set[str]:
    """Values that depend on a linear; a cache write joins nothing, it stores each part apart."""
    reached = {linear.result.name}
    for leaf in leaves:
        if leaf.op != "kv_write" and reached & set(leaf.operands):
            reached.add(leaf.result.name)
    return reached


def _segment(
    members: list[Node],
    reached: set[str],
    leaves: Sequence[Node],
    visible: frozenset[str],
    orders: dict[str, RowOrder],
) -> Segment:
    rest = [n for n in leaves if n.op not in LINEARS and reached & set(n.operands)]
    return Segment(
        linears=tuple(members),
        expands={n.operands[0]: n for n in rest if n.op == "expand"},
        order=orders[members[0].result.name],
        epilogue=Epilogue(
            nodes=[n for n in rest if n.op != "expand"], visible=frozenset(visible & reached)
        ),
    )


def stored_orders(node: Node, queries: dict[str, int]) -> dict[str, RowOrder]:
    """The order in which each linear's outputs are stored.

    `queries` gives the head size of values that attention reads as queries. Keys and queries
    lie as turned heads, values as plain heads, everything else in its own order.
    """
    kinds: dict[str, tuple[int, bool]] = {n: (d, True) for n, d in queries.items()}
    for leaf in node.leaves:
        if leaf.op == "kv_write":
            keys, values = leaf.operands[:2]
            kinds[keys] = (leaf.integer("head_dim"), True)
            kinds[values] = (leaf.integer("head_dim"), False)
    result = {}
    for linear in (leaf for leaf in node.leaves if leaf.op in LINEARS):
        size = linear.result.type.width
        found = [kinds[n] for n in _reached(linear, node.leaves) if n in kinds]
        head_dim, is_turned = found[0] if found else (None, False)
        result[linear.result.name] = RowOrder(count=size, head_dim=head_dim, is_turned=is_turned)
    return result


class LinearLowering:
    """Lowers one node that holds linears."""

    def __init__(self, scope: Scope, node: Node, segments: list[Segment]) -> None:
        self.scope = scope
        self.f = scope.f
        self.node = node
        self.segments = segments
        self.input = segments[0].linears[0].operands[0]
        self.total = scope.count(self.input)
        self.expansions = {
            name: Expansion(scope, expand, segment.order)
            for segment in segments
            for name, expand in segment.expands.items()
        }

    @property
    def out_bytes(self) -> int:
        """A tile's results; what adapters add lies behind them, in the same way."""
        return self.scope.row.tile_rows * ROW_BYTES

    def emit(self) -> None:
        size = self.out_bytes * (2 if self.expansions else 1)
        out = self.f.variable(vector("float", size // 4))
        before = 0
        whole = sum(s.pairs * self.cost(s) for s in self.segments)
        for segment in self.segments:
            start, stop = self.bounds(before, whole, segment)
            before += segment.pairs * self.cost(segment)
            self.walk(segment, start, stop, Value(self.f, out.text, "ptr"))

    def cost(self, segment: Segment) -> int:
        """Relative cost of one pair: the bytes of its weights."""
        tiles = (self.tile(linear, 1) for linear in segment.linears)
        return sum(t.packing.block_bytes(t.groups) // 16 for t in tiles)

    def bounds(self, before: int, whole: int, segment: Segment) -> tuple[Value, Value]:
        """This thread's pairs of a segment: its cut of the whole cost, rounded up to pairs."""
        thread, threads = (self.f.widen(p) for p in self.f.parameters[1:3])
        cost = self.cost(segment)
        edges = []
        for index in (thread, thread + 1):
            cut = (index * whole).divide_signed(threads) - before + (cost - 1)
            edges.append(clamp(self.f, cut.divide_signed(cost), 0, segment.pairs))
        return edges[0], edges[1]

    def walk(self, segment: Segment, start: Value, stop: Value, out: Value) -> None:
        """All pairs, two at a time while rows are few; each over all rows."""
        finish = self.epilogue_function(segment)
        is_alone = len(segment.linears) == 1
        is_few = self.total.compare("sgt", 0) & self.total.compare("sle", self.scope.row.wide_rows)
        wide_stop = self.f.variable("i64", start)
        if is_alone:
            with self.f.when(is_few):
                wide_stop.set(start + ((stop - start) & -2))
            with self.f.loop(start, wide_stop.get(), 2) as pair:
                both = [pair, pair + 1]
                self.fetch(segment, both, self.const(0), self.total)
                self.tile_call(segment.linears, both, self.const(0), self.total, out)
                self.expand(segment, both, self.const(0), self.total, out)
                for index in range(2):
                    self.finish_rows(finish, pair + index, self.const(0), self.total, out, index)
        with (
            self.items(segment, wide_stop.get(), stop) as (pairs, rows),
            self.f.loop(*pairs) as pair,
            self.row_tiles(*rows) as (first, count),
        ):
            self.fetch(segment, [pair], first, count)
            for index, linear in enumerate(segment.linears):
                if not self.can_join(segment):
                    self.tile_call([linear], [pair], first, count, out.at(index * ROW_BYTES // 2))
            if self.can_join(segment):
                self.joined_call(segment, pair, first, count, out)
            self.expand(segment, [pair], first, count, out)
            self.finish_rows(finish, pair, first, count, out, 0)

    def const(self, value: int) -> Value:
        return self.f.const("i64", value)

    @contextmanager
    def items(self, segment: Segment, start: Value, stop: Value) -> Iterator[tuple[Range, Range]]:
        """Loop over what this thread does of a segment: a range of pairs over a range of rows.

        With few rows that is [start, stop) over all rows, once.
        """
        f, size = self.f, self.tile_size()
        span = size * self.tiles_per_item(segment)
        spans = (self.total + (span - 1)) // span
        is_fixed = self.total.compare("sle", size)
        item = f.variable("i64", 0)
        with f.forever() as done:
            with f.when(self.total.compare("sgt", size)):
                item.set(self.scope.draw(segment.linears[0].result.name))
            f.leave(item.get().compare("sge", spans * segment.pairs), done)
            pair, first = item.get() // spans, item.get() % spans * span
            pairs = f.select(is_fixed, start, pair), f.select(is_fixed, stop, pair + 1)
            yield pairs, (first, clamp(f, first + span, 0, self.total))
            f.leave(is_fixed, done)

    def tiles_per_item(self, segment: Segment) -> int:
        inputs = sum(self.tile(linear, 1).groups * GROUP for linear in segment.linears)
        return max(1, _ITEM_INPUTS // (inputs * self.scope.row.tile_rows))

    def tile_size(self) -> Value:
        """Rows of a tile: `rows_per_tile` of all rows, or 1 if there are none."""
        most = self.scope.row.tile_rows
        total = clamp(self.f, self.total, 1, self.total + 1)
        count = (total + (most - 1)) // most
        return (total + (count - 1)) // count

    @contextmanager
    def row_tiles(self, start: Value, stop: Value) -> Iterator[tuple[Value, Value]]:
        """Loop over tiles of rows: the first row and how many."""
        size = self.tile_size()
        with self.f.loop(start, stop, size) as first:
            left = stop - first
            yield first, self.f.select(left.compare("slt", size), left, size)

    def can_join(self, segment: Segment) -> bool:
        """Two linears of one format can share a tile of two pairs."""
        kinds = {(t.format, t.groups) for t in (self.tile(n, 1) for n in segment.linears)}
        return len(segment.linears) == 2 and len(kinds) == 1

    def joined_call(
        self, segment: Segment, pair: Value, first: Value, count: Value, out: Value
    ) -> None:
        is_few = count.compare("sle", self.scope.row.wide_rows)
        with self.f.when(is_few):
            self.tile_call(segment.linears, [pair], first, count, out)
        with self.f.when(count.compare("sgt", self.scope.row.wide_rows)):
            for index, linear in enumerate(segment.linears):
                self.tile_call([linear], [pair], first, count, out.at(index * ROW_BYTES // 2))

    def tile(self, linear: Node, pairs: int) -> Tile:
        weight, x = self.scope.types[linear.operands[1]], self.scope.types[linear.operands[0]]
        groups = -(-int(weight.shape[1]) // GROUP)
        return Tile(format=weight.dtype, dot=x.dtype, groups=groups, pairs=pairs)

    def panel(self, linear: Node) -> Value:
        tile = self.tile(linear, 1)
        packing = PACKINGS[tile.format, tile.dot]
        order = next(s.order for s in self.segments if linear in s.linears)
        return self.scope.weight(Slot(name=linear.operands[1], packing=packing, order=order))

    def tile_call(
        self,
        linears: Sequence[Node],
        pairs: list[Value],
        first: Value,
        count: Value,
        out: Value,
    ) -> None:
        """Call the tile kernel for `count` rows on every linear's every pair."""
        f = self.f
        tile = self.tile(linears[0], len(linears) * len(pairs))
        kind = self.scope.tables.tile(tile)
        size = 2 * tile.packing.block_bytes(tile.groups)
        panels = [self.panel(n).at(pair * size) for n in linears for pair in pairs]
        table = self.scope.load("tiles", "ptr").at(8 * kind * MOST_TILE_ROWS)
        kernel = f.load("ptr", table.at((count - 1) * 8))
        x = self.scope.row_address(self.input, first)
        stride = self.const(self.scope.buffers[self.input].stride)
        f.call_pointer(kernel, *panels, x, stride, out)

    def fetch(self, segment: Segment, pairs: list[Value], first: Value, count: Value) -> None:
        """Have what adapters add to a tile brought near while the tile is computed."""
        for _, expansion, pair in self.expansions_of(segment, pairs):
            self.invoke(expansion.fetch, pair, first, first + count)

    def expand(
        self, segment: Segment, pairs: list[Value], first: Value, count: Value, out: Value
    ) -> None:
        """Compute what adapters add to a tile."""
        for index, expansion, pair in self.expansions_of(segment, pairs):
            place = out.at(self.out_bytes + index * ROW_BYTES // 2)
            self.invoke(expansion.compute, pair, first, first + count, place)

    def expansions_of(
        self, segment: Segment, pairs: list[Value]
    ) -> Iterator[tuple[int, Expansion, Value]]:
        """What adapters change of a tile: which of its pairs, by what, and that pair's number."""
        tiles = [(linear.result.name, pair) for linear in segment.linears for pair in pairs]
        for index, (name, pair) in enumerate(tiles):
            if name in self.expansions:
                yield index, self.expansions[name], pair

    def invoke(self, function: Function, *arguments: Value) -> None:
        """Call a function that sees what this one sees."""
        scope = self.scope
        self.f.invoke(function, scope.context, scope.weights, scope.layer, *arguments)

    def finish_rows(
        self,
        finish: Function,
        pair: Value,
        first: Value,
        count: Value,
        out: Value,
        index: int,
    ) -> None:
        """Run the epilogue on the results of a tile, row by row."""
        with self.f.loop(0, count) as i:
            results = out.at(i * ROW_BYTES).at(index * ROW_BYTES // 2)
            self.invoke(finish, first + i, pair, results)

    def epilogue_function(self, segment: Segment) -> Function:
        """`finish(context, weights, layer, row, pair, results)`, shared by all tile sizes."""
        name = f"{self.f.name}.{segment.linears[0].result.name[1:]}.finish"
        kinds = ("ptr", "ptr", "i64", "i64", "i64", "ptr")
        names = ("context", "weights", "layer", "row", "pair", "results")
        f = self.scope.module.function(name, "void", list(zip(names, kinds, strict=True)))
        context, weights, layer, row, pair, results = f.parameters
        inside = replace(self.scope, f=f, context=context, weights=weights, layer=layer)
        made: dict[str, Pair] = {}
        for index, linear in enumerate(segment.linears):
            name, place = linear.result.name, results.at(index * ROW_BYTES // 2)
            made[name] = self.with_bias(inside, linear, segment.order, pair, place)
            if expand := segment.expands.get(name):
                added = place.at(self.out_bytes)
                made[expand.result.name] = add_expansion(inside, made[name], row, added)
        segment.epilogue.run(inside, made, row, pair)
        f.ret()
        return f

    def with_bias(
        self, scope: Scope, linear: Node, order: RowOrder, pair: Value, results: Value
    ) -> Pair:
        f = scope.f
        low, high = f.load(F32, results, 64), f.load(F32, results.at(4 * LANES), 64)
        if linear.op != "linear" or len(linear.operands) < 3:
            return low, high
        bias = scope.vector(linear.operands[2], order).at(pair * (4 * PAIR_ROWS))
        return low + f.load(F32, bias), high + f.load(F32, bias.at(4 * LANES))

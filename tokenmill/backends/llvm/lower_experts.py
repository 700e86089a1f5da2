"""Mixtures of experts: routing, grouping rows by expert, and the linears of each expert's rows.

What lies in memory, in words of 32 bits (C experts a token of E, T tokens at most):

    routes  [token]: C experts, then C weights (float), the one of most weight first
    groups  [E + 1] starts, filled up to 64 bytes; [T * C] the token of each row; [T * C] the row
            of each pair of token and expert

Rows are ordered by expert and then by token, so each expert's lie together and its linear is that
of `lower_linear.py` on a range of rows. Threads cut the experts by cost; who computes a row, and
which rows are its neighbours, changes nothing in it.
"""

from dataclasses import dataclass

from tokenmill.backends.llvm.emit import Value, vector
from tokenmill.backends.llvm.epilogue import Epilogue, load_value
from tokenmill.backends.llvm.lanes import F32, clamp
from tokenmill.backends.llvm.lower_linear import LinearLowering, Segment
from tokenmill.backends.llvm.packing import PACKINGS, PAIR_ROWS, RowOrder, round_up
from tokenmill.backends.llvm.scope import Scope, Slot, pairs_of
from tokenmill.backends.llvm.tiles import ROW_BYTES
from tokenmill.ir.graph import Node, Type
from tokenmill.ir.order import LANES

_WEIGHT_ROWS = 6
"""Reading a pair of weights from memory costs as much as computing with it for so many rows."""


def words_of(kind: Type) -> int:
    """Words of one row of a value."""
    return 2 * int(kind.shape[1]) if kind.dtype == "routes" else kind.width


def handle_rows(kind: Type, max_tokens: int) -> int:
    """Rows of `routes`, a token each; or of `groups`, E words each: room for what lies there."""
    _, per_token, experts = kind.shape
    if kind.dtype == "routes":
        return max_tokens
    words = _start_words(int(experts)) + 2 * max_tokens * int(per_token)
    return -(-words // round_up(int(experts), PAIR_ROWS))


def _start_words(experts: int) -> int:
    return round_up(experts + 1, 16)


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """The three parts of a value of type `groups`."""

    starts: Value
    tokens: Value
    places: Value

    @staticmethod
    def of(scope: Scope, name: str) -> "_Groups":
        kind = scope.types[name]
        base = scope.row_address(name, scope.f.const("i64", 0))
        tokens = base.at(4 * _start_words(kind.width))
        rows = scope.load("T") * int(kind.shape[1])
        return _Groups(starts=base, tokens=tokens, places=tokens.at(rows * 4))


def lower_route(scope: Scope, node: Node) -> None:
    """Softmax over the experts, then the largest chances one after the other."""
    f, lanes = scope.f, scope.lanes
    logits = node.operands[0]
    experts, top_k = scope.types[logits].width, node.integer("top_k")
    pairs = pairs_of(scope.buffers[logits])
    slot = f.variable(vector("float", pairs * PAIR_ROWS))
    chances = Value(f, slot.text, "ptr")
    with scope.share(scope.count(logits)) as t:
        top, total = f.variable(F32, float("-inf")), f.variable(F32, 0.0)
        with f.loop(0, pairs) as pair:
            for values in load_value(scope, logits, t, pair, float("-inf")):
                top.set(lanes.maximum(values, top.get()))
        largest = lanes.splat(lanes.tree(top.get(), "max"))
        with f.loop(0, pairs) as pair:
            for index, values in enumerate(load_value(scope, logits, t, pair, float("-inf"))):
                power = lanes.exp(values - largest)
                f.store(power, chances.at(pair * (4 * PAIR_ROWS)).at(64 * index), 64)
                total.set(total.get() + power)
        whole = lanes.tree(total.get())
        out = scope.row_address(node.result.name, t)
        with f.loop(0, top_k) as place:
            expert, chance = _take_largest(scope, chances, experts)
            f.store(expert, out.at(place * 4))
            f.store(chance / whole, out.at(place * 4).at(4 * top_k))
        if node.attr("renormalize"):
            _renormalize(scope, out.at(4 * top_k), top_k)


def _take_largest(scope: Scope, chances: Value, count: int) -> tuple[Value, Value]:
    """The first of the largest numbers and its place (i32); it is not found again."""
    f = scope.f
    best, found = f.variable("float", -1.0), f.variable("i64", 0)
    with f.loop(0, count) as index:
        value = f.load("float", chances.at(index * 4))
        is_larger = value.compare("ogt", best.get())
        found.set(f.select(is_larger, index, found.get()))
        best.set(f.select(is_larger, value, best.get()))
    f.store(f.const("float", -2.0), chances.at(found.get() * 4))
    return f.cast("trunc", found.get(), "i32"), best.get()


def _renormalize(scope: Scope, weights: Value, count: int) -> None:
    f = scope.f
    total = f.load("float", weights)
    for index in range(1, count):
        total = total + f.load("float", weights.at(4 * index))
    for index in range(count):
        f.store(f.load("float", weights.at(4 * index)) / total, weights.at(4 * index))


def lower_group(scope: Scope, node: Node) -> None:
    """Counting sort of all pairs by expert, by the first thread alone: a few words a token."""
    f = scope.f
    name, routes = node.result.name, node.operands[0]
    per_token, experts = map(int, scope.types[routes].shape[1:])
    slot = f.variable(vector("i32", round_up(experts, 16)))
    cursors = Value(f, slot.text, "ptr")
    groups = _Groups.of(scope, name)
    with f.when(f.parameters[1].compare("eq", 0)):
        with f.loop(0, experts + 1) as expert:
            f.store(f.const("i32", 0), groups.starts.at(expert * 4))
        with f.loop(0, scope.load("T")) as t, f.loop(0, per_token) as place:
            count = groups.starts.at(_expert(scope, routes, t, place) * 4).at(4)
            f.store(f.load("i32", count) + 1, count)
        with f.loop(0, experts) as expert:
            before = f.load("i32", groups.starts.at(expert * 4))
            f.store(before, cursors.at(expert * 4))
            after = groups.starts.at(expert * 4).at(4)
            f.store(f.load("i32", after) + before, after)
        with f.loop(0, scope.load("T")) as t, f.loop(0, per_token) as place:
            cursor = cursors.at(_expert(scope, routes, t, place) * 4)
            row = f.load("i32", cursor)
            f.store(row + 1, cursor)
            f.store(f.cast("trunc", t, "i32"), groups.tokens.at(row * 4))
            f.store(row, groups.places.at((t * per_token + place) * 4))


def _expert(scope: Scope, routes: str, t: Value, place: Value) -> Value:
    return scope.f.widen(scope.f.load("i32", scope.row_address(routes, t).at(place * 4)))


def lower_dispatch(scope: Scope, node: Node) -> None:
    """A copy of its token's row for each pair, and what is fused with that."""
    f = scope.f
    copy, *rest = node.leaves
    source, groups = copy.operands[0], _Groups.of(scope, copy.operands[1])
    epilogue = Epilogue(nodes=rest, visible=frozenset(v.name for v in node.results))
    with scope.share(scope.count(copy.result.name)) as row:
        token = f.widen(f.load("i32", groups.tokens.at(row * 4)))
        with f.loop(0, pairs_of(scope.buffers[source])) as pair:
            made = {copy.result.name: load_value(scope, source, token, pair)}
            epilogue.run(scope, made, row, pair)


def lower_combine(scope: Scope, node: Node) -> None:
    """The weighted sum of a token's rows, the one of most weight first."""
    f, lanes = scope.f, scope.lanes
    source, routes = node.operands[:2]
    groups, per_token = _Groups.of(scope, node.operands[2]), int(scope.types[routes].shape[1])
    epilogue = Epilogue(nodes=(), visible=frozenset((node.result.name,)))
    with scope.share(scope.count(node.result.name)) as t:
        weights = scope.row_address(routes, t).at(4 * per_token)
        with f.loop(0, pairs_of(scope.buffers[source])) as pair:
            low, high = f.variable(F32, 0.0), f.variable(F32, 0.0)
            with f.loop(0, per_token) as place:
                row = f.widen(f.load("i32", groups.places.at((t * per_token + place) * 4)))
                weight = lanes.splat(f.load("float", weights.at(place * 4)))
                values = load_value(scope, source, row, pair)
                for total, value in zip((low, high), values, strict=True):
                    total.set(lanes.fma(weight, value, total.get()))
            epilogue.run(scope, {node.result.name: (low.get(), high.get())}, t, pair)


class ExpertLowering(LinearLowering):
    """Lowers one node that holds linears of experts."""

    def __init__(self, scope: Scope, node: Node, segments: list[Segment]) -> None:
        super().__init__(scope, node, segments)
        first = segments[0].linears[0]
        self.experts = scope.types[first.operands[2]].width
        self.groups = _Groups.of(scope, first.operands[2])
        self.expert = scope.f.const("i64", 0)

    def emit(self) -> None:
        out = self.f.variable(vector("float", self.scope.row.tile_rows * ROW_BYTES // 4))
        for segment in self.segments:
            self.walk_experts(segment, Value(self.f, out.text, "ptr"))

    def walk_experts(self, segment: Segment, out: Value) -> None:
        """This thread's cut of the cost of all experts that have rows."""
        f = self.f
        finish = self.epilogue_function(segment)
        whole = self.total_cost() * segment.pairs
        thread, threads = (f.widen(p) for p in f.parameters[1:3])
        low, high = ((index * whole).divide_signed(threads) for index in (thread, thread + 1))
        before = f.variable("i64", 0)
        with f.loop(0, self.experts) as expert:
            self.expert = expert
            first, count = self.rows_of(expert)
            with f.when(count.compare("sgt", 0)):
                cost = count + _WEIGHT_ROWS
                start, stop = (
                    clamp(
                        f, (edge - before.get() + (cost - 1)).divide_signed(cost), 0, segment.pairs
                    )
                    for edge in (low, high)
                )
                with (
                    f.loop(start, stop) as pair,
                    f.loop(0, count, self.scope.row.tile_rows) as done,
                ):
                    left = count - done
                    size = f.select(
                        left.compare("slt", self.scope.row.tile_rows),
                        left,
                        self.scope.row.tile_rows,
                    )
                    self.run_tile(segment, pair, first + done, size, out)
                    self.finish_rows(finish, pair, first + done, size, out, 0)
                before.set(before.get() + cost * segment.pairs)

    def total_cost(self) -> Value:
        """Of one pair of every expert that has rows."""
        f = self.f
        total = f.variable("i64", 0)
        with f.loop(0, self.experts) as expert:
            _, count = self.rows_of(expert)
            cost = f.select(count.compare("sgt", 0), count + _WEIGHT_ROWS, 0)
            total.set(total.get() + cost)
        return total.get()

    def rows_of(self, expert: Value) -> tuple[Value, Value]:
        """An expert's first row, and how many it has."""
        f = self.f
        place = self.groups.starts.at(expert * 4)
        first = f.widen(f.load("i32", place))
        return first, f.widen(f.load("i32", place.at(4))) - first

    def run_tile(
        self, segment: Segment, pair: Value, first: Value, count: Value, out: Value
    ) -> None:
        if self.can_join(segment):
            self.joined_call(segment, pair, first, count, out)
            return
        for index, linear in enumerate(segment.linears):
            self.tile_call([linear], [pair], first, count, out.at(index * ROW_BYTES // 2))

    def panel(self, linear: Node) -> Value:
        """The address of the present expert's part of the packed weight."""
        tile = self.tile(linear, 1)
        packing = PACKINGS[tile.format, tile.dot]
        rows = int(self.scope.types[linear.operands[1]].shape[0])
        order = RowOrder(count=rows, parts=self.experts)
        whole = self.scope.weight(Slot(name=linear.operands[1], packing=packing, order=order))
        blocks = order.width // self.experts // LANES
        return whole.at(self.expert * (blocks * packing.block_bytes(tile.groups)))

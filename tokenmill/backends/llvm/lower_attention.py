"""Attention over the paged cache: one item is one token and one key head.

Threads draw items from a counter, so a long sequence does not hold up the others. The query
heads that share a key head are computed together, and each chunk of KV_CHUNK positions is done in
three sweeps: scores, weights, weighted sum of values; see `ir/order.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tokenmill.backends.base import BLOCK_SIZE
from tokenmill.backends.llvm.emit import Value, Variable, vector
from tokenmill.backends.llvm.epilogue import Epilogue
from tokenmill.backends.llvm.kv_cache import (
    ELEMENT_BYTES,
    head_address,
    is_windowed,
    key_pair_bytes,
    load_int8,
    value_scale,
)
from tokenmill.backends.llvm.lanes import F32, I16, I32
from tokenmill.backends.llvm.packing import PAIR_ROWS
from tokenmill.backends.llvm.scope import Scope
from tokenmill.ir.graph import Node
from tokenmill.ir.order import KV_CHUNK, LANES, padded_head, stored_dims

_MAX_SUMS = 16
"""Vectors of output that one sweep over the values keeps in registers."""
_NEVER = float("-inf")


@dataclass(frozen=True, kw_only=True)
class _Heads:
    """The sizes of one attention."""

    kv_heads: int
    share: int  # query heads that read one key head
    head_dim: int
    to: str
    scale: float
    window: int  # a token sees what is less than so far from it; 0: all
    softcap: float  # 0: none
    is_causal: bool  # a token sees nothing behind itself

    @property
    def stored(self) -> int:
        return padded_head(self.head_dim)

    @property
    def query_bytes(self) -> int:
        """Of one element of a query, which is rounded for a bf16 cache only."""
        return 2 if self.to == "bf16" else 4

    @property
    def vectors(self) -> int:
        return self.stored // LANES


def lower_attention(scope: Scope, node: Node, write: Node) -> None:
    """`write` is the kv_write whose cache this reads."""
    attend, *rest = node.leaves
    epilogue = Epilogue(nodes=rest, visible=frozenset(v.name for v in node.results))
    kv_heads = int(write.result.type.shape[0])
    head_dim = attend.integer("head_dim")
    heads = int(attend.result.type.shape[1]) // head_dim
    given = dict(attend.attrs)
    sizes = _Heads(
        kv_heads=kv_heads,
        share=heads // kv_heads,
        head_dim=head_dim,
        to=write.string("to"),
        scale=attend.real("scale"),
        window=attend.integer("window") if "window" in given else 0,
        softcap=attend.real("softcap") if "softcap" in given else 0.0,
        is_causal=bool(given.get("causal", True)),
    )
    _Attention(scope, attend, write, sizes, epilogue).emit()


@dataclass(frozen=True)
class _Chunk:
    """One chunk of positions: [0, count) lie in `blocks`, and the first `skipped` are not seen."""

    blocks: Value  # address of the first one's number
    skipped: Value
    count: Value

    @property
    def blocks_seen(self) -> tuple[Value, Value]:
        """From which block to which; blocks outside are not read, others may own them."""
        return self.skipped // BLOCK_SIZE, (self.count + (BLOCK_SIZE - 1)) // BLOCK_SIZE


class _Attention:
    """The pieces of one attention phase while it is emitted."""

    def __init__(
        self, scope: Scope, attend: Node, write: Node, sizes: _Heads, epilogue: Epilogue
    ) -> None:
        self.scope = scope
        self.f = scope.f
        self.lanes = scope.lanes
        self.attend = attend
        self.write = write
        self.sizes = sizes
        self.epilogue = epilogue
        share = sizes.share
        self.scores = self.memory(share * KV_CHUNK)
        self.outs = self.memory(share * sizes.stored)
        self.queries = self.memory(share * sizes.stored)
        self.tops = [self.f.variable("float") for _ in range(share)]
        self.totals = [self.f.variable("float") for _ in range(share)]

    def memory(self, floats: int) -> Value:
        slot = self.f.variable(vector("float", floats))
        return Value(self.f, slot.text, "ptr")

    def emit(self) -> None:
        f, scope = self.f, self.scope
        items = scope.load("T") * self.sizes.kv_heads
        with f.forever() as done:
            item = scope.draw(self.attend.result.name)
            f.leave(item.compare("sge", items), done)
            self.item(item // self.sizes.kv_heads, item % self.sizes.kv_heads)

    def item(self, token: Value, head: Value) -> None:
        f, sizes = self.f, self.sizes
        query = self.query(token, head)
        for top, total in zip(self.tops, self.totals, strict=True):
            top.set(_NEVER)
            total.set(0.0)
        for index in range(sizes.share * sizes.vectors):
            f.store(self.lanes.zero(), self.outs.at(64 * index))
        length = self.length_seen(token)
        sequence = f.widen(self.scope.element("sequences", token))
        kind = "window_tables" if is_windowed(self.write.result.type) else "block_tables"
        table = self.scope.load(kind, "ptr")
        blocks = table.at(sequence * self.scope.load("table_stride") * 4)
        first = self.first_seen(token)
        with f.loop(first & -KV_CHUNK, length, KV_CHUNK) as start:
            left = length - start
            count = f.select(left.compare("slt", KV_CHUNK), left, KV_CHUNK)
            chunk = _Chunk(
                blocks.at(start // BLOCK_SIZE * 4), self.at_least_0(first - start), count
            )
            self.chunk(query, head, chunk)
        self.finish(token, head)

    def length_seen(self, token: Value) -> Value:
        """Behind which position a token sees nothing more."""
        f, window = self.f, self.sizes.window
        if self.sizes.is_causal:
            return self.position(token) + 1
        sequence = f.widen(self.scope.element("sequences", token))
        length = f.widen(self.scope.element("lengths", sequence))
        if not window:
            return length
        edge = self.position(token) + window
        return f.select(edge.compare("slt", length), edge, length)

    def first_seen(self, token: Value) -> Value:
        """The first position that a token sees."""
        if not self.sizes.window:
            return self.f.const("i64", 0)
        return self.at_least_0(self.position(token) + (1 - self.sizes.window))

    def position(self, token: Value) -> Value:
        return self.f.widen(self.scope.element("positions", token))

    def at_least_0(self, value: Value) -> Value:
        """Of a window's edge; constant where there is none."""
        if not self.sizes.window:
            return self.f.const("i64", 0)
        return self.f.select(value.compare("slt", 0), 0, value)

    def query(self, token: Value, head: Value) -> Value:
        """The address of this item's query heads, stored like the keys."""
        sizes = self.sizes
        name = self.attend.operands[0]
        buffer = self.scope.buffers[name]
        element = sizes.query_bytes
        row = self.scope.row_address(name, token)
        if buffer.order.is_turned:
            return row.at(head * (sizes.share * sizes.stored * element))
        self.turn_queries(row.at(head * (sizes.share * sizes.head_dim * element)))
        return self.queries

    def turn_queries(self, plain: Value) -> None:
        """Copy queries that no projection stored as heads, element by element."""
        f, sizes = self.f, self.sizes
        element = sizes.query_bytes
        kind = "i16" if element == 2 else "i32"
        with f.loop(0, sizes.share) as head:
            source = plain.at(head * (sizes.head_dim * element))
            target = self.queries.at(head * (sizes.stored * element))
            for stored, d in enumerate(stored_dims(sizes.head_dim, is_turned=True)):
                value = f.load(kind, source.at(int(d) * element)) if d >= 0 else f.const(kind, 0)
                f.store(value, target.at(stored * element))

    # -- one chunk

    def chunk(self, query: Value, head: Value, chunk: "_Chunk") -> None:
        f = self.f
        highest = [f.variable(F32, _NEVER) for _ in range(self.sizes.share)]
        with f.loop(*chunk.blocks_seen) as block:
            keys = self.block_head("keys", chunk.blocks, block, head)
            self.score_block(query, keys, block, chunk, highest)
        rates = [self.weigh(i, highest[i], chunk) for i in range(self.sizes.share)]
        for heads in self.head_groups():
            self.add_values(heads, head, chunk, rates)

    def block_head(self, field: str, blocks: Value, block: Value, head: Value) -> Value:
        number = self.f.widen(self.f.load("i32", blocks.at(block * 4)))
        return head_address(self.scope, field, number, head, self.write)

    def score_block(
        self, query: Value, keys: Value, block: Value, chunk: "_Chunk", highest: list[Variable]
    ) -> None:
        """q.k for the positions of one block, one a lane; those that it does not see are never."""
        f, sizes = self.f, self.sizes
        dots = [f.variable(F32, 0.0) for _ in range(sizes.share)]
        with f.loop(0, sizes.stored // PAIR_ROWS) as pair:
            place = keys.at(pair * key_pair_bytes(sizes.to))
            at = query.at(pair * (PAIR_ROWS * sizes.query_bytes))
            if sizes.to == "int8":
                self.score_int8(at, place, dots)
            else:
                self.score_pair(at, place, dots)
        lane = f.lanes(I32, range(LANES))
        limit = self.lanes.splat(f.cast("trunc", chunk.count - block * BLOCK_SIZE, "i32"))
        is_seen = lane.compare("slt", limit)
        if sizes.window:
            edge = self.lanes.splat(f.cast("trunc", chunk.skipped - block * BLOCK_SIZE, "i32"))
            is_seen = is_seen & lane.compare("sge", edge)
        for index, (dot, top) in enumerate(zip(dots, highest, strict=True)):
            score = dot.get() * sizes.scale
            if sizes.softcap:
                score = self.lanes.softcap(score, sizes.softcap)
            score = f.select(is_seen, score, f.const(F32, _NEVER))
            f.store(score, self.scores.at(index * KV_CHUNK * 4).at(block * 64), 64)
            top.set(self.lanes.maximum(score, top.get()))

    def score_pair(self, query: Value, keys: Value, dots: list[Variable]) -> None:
        """Add a pair of vectors of q.k, in words of 32 bits: one dimension, or two of bf16."""
        f, sizes = self.f, self.sizes
        steps = PAIR_ROWS * sizes.query_bytes // 4
        for step in range(steps):
            key = f.load(I32, keys.at(64 * step), 64)
            for index, dot in enumerate(dots):
                at = query.at(index * sizes.stored * sizes.query_bytes + 4 * step)
                x = self.lanes.splat(f.load("i32", at))
                dot.set(self.multiply(dot.get(), key, x))

    def multiply(self, acc: Value, key: Value, x: Value) -> Value:
        if self.sizes.to == "bf16":
            return self.lanes.dot_bf16(acc, key, x)
        return self.lanes.fma(self.f.bitcast(key, F32), self.f.bitcast(x, F32), acc)

    def score_int8(self, query: Value, keys: Value, dots: list[Variable]) -> None:
        """The same for integers: their dot from zero, times the scale of each position."""
        f, sizes = self.f, self.sizes
        sums = [f.variable(F32, 0.0) for _ in dots]
        for step in range(PAIR_ROWS):
            key = load_int8(self.lanes, keys.at(BLOCK_SIZE * step))
            for index, total in enumerate(sums):
                x = self.lanes.splat(f.load("float", query.at((index * sizes.stored + step) * 4)))
                total.set(self.lanes.fma(key, x, total.get()))
        scales = f.load(F32, keys.at(PAIR_ROWS * BLOCK_SIZE))
        for total, dot in zip(sums, dots, strict=True):
            dot.set(self.lanes.fma(scales, total.get(), dot.get()))

    def weigh(self, index: int, highest: Variable, chunk: "_Chunk") -> tuple[Value, Value]:
        """exp(score - top) in place; how much the sums so far and this chunk then count."""
        f, lanes = self.f, self.lanes
        top, total = self.tops[index], self.totals[index]
        chunk_top = lanes.tree(highest.get(), "max")
        scores = self.scores.at(index * KV_CHUNK * 4)
        mass = f.variable(F32, 0.0)
        with f.loop(*chunk.blocks_seen) as block:
            place = scores.at(block * 64)
            weight = lanes.exp(f.load(F32, place, 64) - lanes.splat(chunk_top))
            f.store(weight, place, 64)
            mass.set(mass.get() + weight)
        new_top = lanes.maximum(top.get(), chunk_top)
        old, new = lanes.exp(top.get() - new_top), lanes.exp(chunk_top - new_top)
        total.set(total.get() * old + lanes.tree(mass.get()) * new)
        top.set(new_top)
        return lanes.splat(old), lanes.splat(new)

    def head_groups(self) -> Iterator[range]:
        """Query heads whose outputs fit in registers together."""
        size = max(1, _MAX_SUMS // self.sizes.vectors)
        for start in range(0, self.sizes.share, size):
            yield range(start, min(start + size, self.sizes.share))

    def add_values(
        self,
        heads: range,
        head: Value,
        chunk: "_Chunk",
        rates: list[tuple[Value, Value]],
    ) -> None:
        """Sum weight * value over the chunk's positions, then merge with what was before."""
        f, sizes, lanes = self.f, self.sizes, self.lanes
        sums = {(h, v): f.variable(F32, 0.0) for h in heads for v in range(sizes.vectors)}
        row_bytes = sizes.stored * ELEMENT_BYTES[sizes.to]
        with f.loop(*chunk.blocks_seen) as block:
            values = self.block_head("values", chunk.blocks, block, head)
            left = chunk.count - block * BLOCK_SIZE
            edge = self.at_least_0(chunk.skipped - block * BLOCK_SIZE)
            inside = f.select(left.compare("slt", BLOCK_SIZE), left, BLOCK_SIZE)
            weights = self.scores.at(block * 64)
            with f.loop(edge, inside) as position:
                row = values.at(position * row_bytes)
                loaded = [self.load_value(row, v) for v in range(sizes.vectors)]
                if sizes.to == "int8":
                    loaded = self.scaled(loaded, values, position)
                for h in heads:
                    place = weights.at(h * KV_CHUNK * 4).at(position * 4)
                    weight = lanes.splat(f.load("float", place))
                    for v, value in enumerate(loaded):
                        sums[h, v].set(lanes.fma(weight, value, sums[h, v].get()))
        for (h, v), variable in sums.items():
            place = self.outs.at((h * sizes.vectors + v) * 64)
            old, new = rates[h]
            f.store(f.load(F32, place, 64) * old + variable.get() * new, place, 64)

    def scaled(self, loaded: list[Value], values: Value, position: Value) -> list[Value]:
        """Integer values times the scales of their pairs."""
        places = [
            value_scale(values, position, pair, self.sizes.head_dim)
            for pair in range(self.sizes.vectors // 2)
        ]
        scales = [self.lanes.splat(self.f.load("float", place)) for place in places]
        return [value * scales[index // 2] for index, value in enumerate(loaded)]

    def load_value(self, row: Value, index: int) -> Value:
        if self.sizes.to == "int8":
            return load_int8(self.lanes, row.at(index * LANES))
        if self.sizes.to == "bf16":
            return self.lanes.bf16_to_f32(self.f.load(I16, row.at(index * LANES * 2)))
        return self.f.load(F32, row.at(index * LANES * 4))

    # -- the result

    def finish(self, token: Value, head: Value) -> None:
        """Divide by the total, and hand on: in pairs, or cut to the head's true size."""
        sizes = self.sizes
        for index in range(sizes.share):
            total = self.lanes.splat(self.totals[index].get())
            place = self.outs.at(index * sizes.stored * 4)
            query_head = head * sizes.share + index
            if sizes.head_dim % PAIR_ROWS == 0:
                self.finish_pairs(token, query_head, place, total)
            else:
                self.finish_cut(token, query_head, place, total)

    def finish_pairs(self, token: Value, head: Value, place: Value, total: Value) -> None:
        pairs = self.sizes.head_dim // PAIR_ROWS
        for pair in range(pairs):
            low = self.f.load(F32, place.at(128 * pair), 64) / total
            high = self.f.load(F32, place.at(128 * pair + 64), 64) / total
            made = {self.attend.result.name: (low, high)}
            self.epilogue.run(self.scope, made, token, head * pairs + pair)

    def finish_cut(self, token: Value, head: Value, place: Value, total: Value) -> None:
        """Heads lie side by side whatever their size; another thread may own the next one."""
        f, size = self.f, self.sizes.head_dim
        out = self.scope.row_address(self.attend.result.name, token).at(head * (4 * size))
        for index in range(self.sizes.vectors):
            f.store(f.load(F32, place.at(64 * index), 64) / total, place.at(64 * index), 64)
        with f.loop(0, size) as d:
            f.store(f.load("float", place.at(d * 4)), out.at(d * 4))

"""Lowers a whole graph to one native program that every worker runs.

`step(context, thread, threads)` is `main`; each layer body is a function called once a layer with
the address of that layer's weights. A node is a phase; `barrier` nodes stand where the pass
put them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from tokenmill.backends.llvm.emit import Function, Module, Value
from tokenmill.backends.llvm.lower_adapters import lower_shrink
from tokenmill.backends.llvm.lower_attention import lower_attention
from tokenmill.backends.llvm.lower_experts import (
    ExpertLowering,
    handle_rows,
    lower_combine,
    lower_dispatch,
    lower_group,
    lower_route,
    words_of,
)
from tokenmill.backends.llvm.lower_linear import (
    LINEARS,
    LinearLowering,
    Segment,
    segments_of,
    stored_orders,
)
from tokenmill.backends.llvm.lower_rows import (
    copy_row,
    lower_elementwise,
    lower_embed,
    lower_head_norm,
    lower_kv_write,
    lower_layer_norm,
    lower_norm,
    lower_rope,
    lower_select,
)
from tokenmill.backends.llvm.lower_sample import lower_sample
from tokenmill.backends.llvm.packing import RowOrder
from tokenmill.backends.llvm.scope import Buffer, Scope, Slot, Tables
from tokenmill.backends.llvm.target import Row
from tokenmill.backends.llvm.tiles import Tile
from tokenmill.backends.llvm.workers import barrier_ir
from tokenmill.ir.graph import Function as GraphFunction
from tokenmill.ir.graph import Graph, Node, Type, layer_bodies, layer_weight, walk
from tokenmill.passes.plan_memory import plan_memory
from tokenmill.passes.round_activations import ROUNDED_FOR

_HANDLES = ("place", "sampling", "adapters", "kv", "i32")


@dataclass(frozen=True, kw_only=True)
class WeightEntry:
    """One place in the table of packed weights: whose weight lies there, and laid out how."""

    place: int
    name: str  # the weight's full name; for rotary angles, any
    slot: Slot


@dataclass(frozen=True, kw_only=True)
class Program:
    """A lowered graph: its code, and what Python must allocate and fill for it."""

    ir_text: str
    tiles: tuple[Tile, ...]
    entries: tuple[WeightEntry, ...]
    arena_bytes: int
    logits: Buffer | None  # None: nothing is sampled
    hidden: Buffer | None  # last hidden states of the tokens to pool; None: none are
    caches: tuple[Type | None, ...]  # kv of each layer, then of main; None: it has none
    num_counters: int
    cache_dtype: str
    has_experts: bool  # so a step may need tiles of any number of rows


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a program is specialised on beside its graph."""

    row: Row
    activations: str
    max_tokens: int
    max_rows: int


def lower(graph: Graph, options: Options) -> Program:
    """Lower a graph that has been through the SPMD passes."""
    return _Lowering(graph, options).run()


def lower_alone(graph: Graph, options: Options, node: Node) -> Module:
    """The functions of one phase and no other, with weights where the whole program has them."""
    whole = _Lowering(graph, options)
    whole.run()
    alone = _Lowering(graph, options, whole.tables, only=node)
    alone.run()
    return alone.module


def segments_in(function: GraphFunction, node: Node) -> list[Segment]:
    """The linears of a node, those together that are walked together."""
    return segments_of(node, stored_orders(node, _queries(function, node)))


class _Lowering:
    def __init__(
        self,
        graph: Graph,
        options: Options,
        tables: Tables | None = None,
        only: Node | None = None,
    ) -> None:
        self.graph = graph
        self.options = options
        self.only = only
        self.module = Module(graph.name)
        self.module.raw.append(barrier_ir())
        self.counts = {"T": options.max_tokens, "R": options.max_rows, "E": options.max_tokens}
        self.arena_bytes = 0
        self.num_layers = sum(len(layer_bodies(n)) for n in _repeats(graph.main))
        self.tables = tables or Tables(num_layers=self.num_layers + 1)
        self.writes = [n for f in graph.functions for n in walk(f.nodes) if n.op == "kv_write"]

    def run(self) -> Program:
        main = self.graph.main
        buffers = self.buffers(main, {})
        bodies = self.lower_bodies(main, buffers)
        f = self.module.function("step", "void", _parameters(), public=True)
        scope = self.scope(main, buffers, f)
        self.phases(scope, main, bodies)
        f.ret()
        dtypes = {n.string("to") for n in self.writes}
        if len(dtypes) > 1:
            raise ValueError(f"layers with different KV caches: {sorted(dtypes)}")
        return Program(
            ir_text=str(self.module),
            tiles=tuple(self.tables.tiles),
            entries=tuple(self.entries(main)),
            arena_bytes=self.arena_bytes,
            logits=_returned(main, buffers, "R"),
            hidden=_returned(main, buffers, "E"),
            caches=tuple(self.caches()),
            num_counters=self.tables.num_counters,
            cache_dtype=next(iter(dtypes), "f32"),
            has_experts=any(
                t.op == "expert_linear" for f in self.graph.functions for t in walk(f.nodes)
            ),
        )

    def caches(self) -> Iterator[Type | None]:
        """The cache of each layer, and last that of main."""
        for repeat in _repeats(self.graph.main):
            for name in layer_bodies(repeat):
                yield _cache_of(self.graph.function(name))
        yield _cache_of(self.graph.main)

    # -- where values lie

    def buffers(self, function: GraphFunction, fixed: dict[str, Buffer]) -> dict[str, Buffer]:
        """A place in the arena for every value that needs one."""
        types = function.values
        shown = {v.name for n in function.nodes for v in n.results} | fixed.keys()
        summed = _summed(function)
        heads = _stored_heads(function)
        shapes = {
            name: Buffer(
                type=types[name],
                order=heads.get(name, RowOrder(count=words_of(types[name]))),
                is_record=name in summed or types[name].dtype in ("bf16", "int8"),
                max_rows=self.max_rows(types[name]),
            )
            for name in shown
            if types[name].dtype not in _HANDLES
        }
        sizes = {name: buffer.size_bytes for name, buffer in shapes.items()}
        plan = plan_memory(
            function,
            sizes,
            start=self.arena_bytes,
            fixed={name: buffer.offset for name, buffer in fixed.items()},
            takes_over=partial(_takes_over, shapes),
        )
        self.arena_bytes = max(self.arena_bytes, plan.size_bytes)
        return {n: replace(b, offset=plan.offsets[n]) for n, b in shapes.items()}

    def max_rows(self, kind: Type) -> int:
        if kind.dtype in ("routes", "groups"):
            return handle_rows(kind, self.options.max_tokens)
        leading, *others = kind.rows
        return self.counts[str(leading)] * prod(map(int, others))

    # -- functions

    def lower_bodies(self, main: GraphFunction, buffers: dict[str, Buffer]) -> dict[str, Function]:
        """One native function a body; bodies share the arena beyond main's part."""
        lowered: dict[str, Function] = {}
        start = self.arena_bytes
        top = start
        for repeat in _repeats(main):
            for name in dict.fromkeys(layer_bodies(repeat)):
                self.arena_bytes = start
                carried = buffers[repeat.result.name]
                lowered[name] = self.lower_body(self.graph.function(name), carried)
                top = max(top, self.arena_bytes)
        self.arena_bytes = top
        return lowered

    def lower_body(self, body: GraphFunction, carried: Buffer) -> Function:
        x = body.params[0].name
        buffers = self.buffers(body, {x: carried})
        f = self.module.function(
            body.name, "void", [*_parameters(), ("weights", "ptr"), ("layer", "i64")]
        )
        scope = self.scope(body, buffers, f)
        self.phases(scope, body, {})
        made = buffers[body.returns[0]]
        if made.offset != carried.offset:
            self.copy_value(scope, body.returns[0], x)
        f.ret()
        return f

    def scope(self, function: GraphFunction, buffers: dict[str, Buffer], f: Function) -> Scope:
        parameters = {p.text: p for p in f.parameters}
        context = parameters["%context"]
        is_body = "%layer" in parameters
        inside = Scope(
            module=self.module,
            row=self.options.row,
            tables=self.tables,
            name=function.name,
            types=function.values,
            buffers=buffers,
            summed=frozenset(_summed(function)),
            f=f,
            context=context,
            weights=context,
            layer=parameters["%layer"] if is_body else f.const("i64", self.num_layers),
        )
        weights = parameters["%weights"] if is_body else inside.load("weights", "ptr")
        return replace(inside, weights=weights)

    def phases(self, scope: Scope, function: GraphFunction, bodies: dict[str, Function]) -> None:
        for node in function.nodes:
            if self.only is None or node is self.only:
                self.phase(scope, function, node, bodies)

    def barrier(self, scope: Scope) -> None:
        control = scope.load("control", "ptr")
        scope.f.call("barrier", "void", control, scope.f.parameters[2])

    def phase(
        self, scope: Scope, function: GraphFunction, node: Node, bodies: dict[str, Function]
    ) -> None:
        ops = {leaf.op for leaf in node.leaves}
        if node.op == "repeat":
            self.call_layers(scope, bodies, node)
        elif node.op == "barrier":
            self.barrier(scope)
        elif "linear" in ops:
            LinearLowering(scope, node, segments_in(function, node)).emit()
        elif "expert_linear" in ops:
            ExpertLowering(scope, node, segments_in(function, node)).emit()
        elif "shrink" in ops:
            lower_shrink(scope, node)
        elif "dispatch" in ops:
            lower_dispatch(scope, node)
        elif "attention" in ops:
            lower_attention(scope, node, _write_of(function, node))
        elif "rmsnorm" in ops:
            lower_norm(scope, node)
        elif "layer_norm" in ops:
            lower_layer_norm(scope, node)
        elif node.op in ("embed", "embed_place"):
            table = function.values[node.operands[1]]
            lower_embed(scope, node, ROUNDED_FOR[table.dtype][self.options.activations])
        else:
            _PHASES.get(node.op, lower_elementwise)(scope, node)

    def call_layers(self, scope: Scope, bodies: dict[str, Function], repeat: Node) -> None:
        """Call each layer's body with the address of its weights."""
        f = scope.f
        self.enter_layers(scope, repeat)
        names = list(dict.fromkeys(layer_bodies(repeat)))
        order = [names.index(n) for n in layer_bodies(repeat)]
        kinds = self.module.constants(f"{repeat.result.name[1:]}.order", "i32", order)
        first, base = self.layer_places()[repeat.result.name]
        with f.loop(0, len(order)) as index:
            weights = scope.weights.at(8 * first).at(index * (8 * self.stride(repeat)))
            arguments = (*f.parameters[:3], weights, index + base)
            kind = f.load("i32", Value(f, kinds, "ptr").at(index * 4))
            for number, name in enumerate(names):
                with f.when(kind.compare("eq", number)):
                    f.invoke(bodies[name], *arguments)

    def enter_layers(self, scope: Scope, repeat: Node) -> None:
        """Bring the first layer's input to where the layers keep theirs."""
        source, target = repeat.operands[0], repeat.result.name
        if scope.buffers[source].offset != scope.buffers[target].offset:
            self.copy_value(scope, source, target)

    def copy_value(self, scope: Scope, source: str, target: str) -> None:
        with scope.share(scope.count(source)) as t:
            size = scope.buffers[target].stride
            copy_row(scope, scope.row_address(source, t), scope.row_address(target, t), size)
        self.barrier(scope)

    # -- the table of weights

    def layer_places(self) -> dict[str, tuple[int, int]]:
        """By repeat: where its weights start in the table, and its first layer's index."""
        places = {}
        first, base = _MAIN_SLOTS, 0
        for repeat in _repeats(self.graph.main):
            count = len(layer_bodies(repeat))
            places[repeat.result.name] = (first, base)
            first, base = first + self.stride(repeat) * count, base + count
        return places

    def stride(self, repeat: Node) -> int:
        """Places in the table of weights that one layer takes."""
        return max(len(self.tables.slots.get(n, [])) for n in layer_bodies(repeat))

    def entries(self, main: GraphFunction) -> Iterator[WeightEntry]:
        """Every place in the table of weights that something lies in."""
        slots = self.tables.slots.get("main", [])
        assert len(slots) <= _MAIN_SLOTS
        for place, slot in enumerate(slots):
            yield WeightEntry(place=place, name=slot.name.removeprefix("@"), slot=slot)
        for repeat in _repeats(main):
            first, _ = self.layer_places()[repeat.result.name]
            for layer, body in enumerate(layer_bodies(repeat)):
                start = first + layer * self.stride(repeat)
                for index, slot in enumerate(self.tables.slots.get(body, [])):
                    name = layer_weight(repeat, layer, slot.name)
                    yield WeightEntry(place=start + index, name=name, slot=slot)


_MAIN_SLOTS = 64
"""Room for main's weights at the start of the table, so that layers start at a known place."""

_PHASES = {
    "select_rows": lower_select,
    "rope": lower_rope,
    "head_norm": lower_head_norm,
    "kv_write": lower_kv_write,
    "route": lower_route,
    "group": lower_group,
    "combine": lower_combine,
    "sample": lower_sample,
}


def _returned(main: GraphFunction, buffers: dict[str, Buffer], leading: str) -> Buffer | None:
    """Where the first value lies that is returned with so many rows; None: there is none."""
    types = main.values
    found = (n for n in main.returns if types[n].dtype == "f32" and types[n].rows == (leading,))
    name = next(found, None)
    return None if name is None else buffers[name]


def _repeats(main: GraphFunction) -> list[Node]:
    return [n for n in main.nodes if n.op == "repeat"]


def _parameters() -> list[tuple[str, str]]:
    return [("context", "ptr"), ("thread", "i32"), ("threads", "i32")]


def _summed(function: GraphFunction) -> set[str]:
    """Values that linears read: rounded ones, whose group sums are kept beside them."""
    return {n.operands[0] for n in walk(function.nodes) if n.op in LINEARS}


def _queries(function: GraphFunction, node: Node) -> dict[str, int]:
    """Head sizes of the queries that a merged q, k, v node makes."""
    if not any(leaf.op == "kv_write" for leaf in node.leaves):
        return {}
    made = {v.name for v in node.results}
    readers = [n for n in walk(function.nodes) if n.op == "attention"]
    return {n.operands[0]: n.integer("head_dim") for n in readers if n.operands[0] in made}


def _stored_heads(function: GraphFunction) -> dict[str, RowOrder]:
    """Values that lie as stored heads: the queries of merged q, k, v nodes."""
    types = function.values
    return {
        name: RowOrder(count=types[name].width, head_dim=size, is_turned=True)
        for node in function.nodes
        for name, size in _queries(function, node).items()
    }


def _cache_of(function: GraphFunction) -> Type | None:
    writes = (n.result.type for n in walk(function.nodes) if n.op == "kv_write")
    return next(writes, None)


def _write_of(function: GraphFunction, node: Node) -> Node:
    """The kv_write whose cache an attention reads."""
    kv = next(leaf for leaf in node.leaves if leaf.op == "attention").operands[1]
    return next(n for n in walk(function.nodes) if n.op == "kv_write" and n.result.name == kv)


def _takes_over(shapes: dict[str, Buffer], node: Node) -> Iterator[tuple[str, str]]:
    """Results that may be written where an operand lies: element by element, same layout."""
    if node.op == "repeat":
        yield node.result.name, node.operands[0]
        return
    results = {v.name for v in node.results}
    for leaf in node.leaves:
        if leaf.op != "add" or leaf.result.name not in results:
            continue
        for operand in leaf.operands:
            target = shapes[leaf.result.name]
            if operand in node.operands and shapes[operand].stride == target.stride:
                yield leaf.result.name, operand
                break

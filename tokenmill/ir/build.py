"""Builds graphs: one method an operation, so that a model file reads like its paper."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from tokenmill.ir.graph import Attr, Attrs, Function, Graph, Names, Node, Type, Value
from tokenmill.ir.ops import infer

Kind = TypeVar("Kind", bound=Hashable)


class FunctionBuilder:
    """Grows one function. Every method takes and returns values and infers the types."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.functions: list[Function] = []
        self._params: list[Value] = []
        self._weights: dict[str, Value] = {}
        self._nodes: list[Node] = []
        self._names = Names()

    def param(self, name: str, dtype: str, *shape: int | str) -> Value:
        value = Value(self._names.fresh(f"%{name}"), Type(dtype, shape))
        self._params.append(value)
        return value

    def weight(self, name: str, *shape: int) -> Value:
        """A weight of this function; asking again for the same name gives the same one.

        With three sizes, it is a factor of what adapters change; see graph.Type.
        """
        kind = Type({1: "f32", 2: "w", 3: "lora"}[len(shape)], shape)
        value = self._weights.setdefault(name, Value(f"@{name}", kind))
        assert value.type == kind, (value, kind)
        return value

    def emit(self, op: str, *operands: Value, name: str = "", **attrs: Attr) -> Value:
        return self.node(op, operands, attrs, name or op)

    def node(
        self, op: str, operands: Sequence[Value], attrs: Mapping[str, Attr], name: str
    ) -> Value:
        """Append a node, and infer its type."""
        names = tuple(o.name for o in operands)
        draft = Node(op, names, (), tuple(attrs.items()))
        kind = infer(draft, [o.type for o in operands])
        value = Value(self._names.fresh(f"%{name}"), kind)
        self._nodes.append(Node(op, names, (value,), draft.attrs))
        return value

    def embed(self, tokens: Value, table: Value) -> Value:
        return self.emit("embed", tokens, table)

    def rmsnorm(self, x: Value, weight: Value, *, eps: float) -> Value:
        return self.emit("rmsnorm", x, weight, eps=eps)

    def embed_place(self, place: Value, table: Value, *, by: str, offset: int = 0) -> Value:
        """A row of the table for each token, `by` its position or by its segment."""
        attrs: dict[str, Attr] = {"by": by, **({"offset": offset} if offset else {})}
        return self.node("embed_place", (place, table), attrs, f"{by}s")

    def layer_norm(
        self, x: Value, weight: Value, bias: Value | None = None, *, eps: float
    ) -> Value:
        operands = (x, weight) if bias is None else (x, weight, bias)
        return self.emit("layer_norm", *operands, eps=eps)

    def linear(self, x: Value, weight: Value, bias: Value | None = None) -> Value:
        operands = (x, weight) if bias is None else (x, weight, bias)
        return self.emit("linear", *operands, name=weight.name[1:])

    def head_norm(self, x: Value, weight: Value, *, head_dim: int, eps: float) -> Value:
        return self.emit("head_norm", x, weight, head_dim=head_dim, eps=eps)

    def rope(self, x: Value, place: Value, *, head_dim: int, **angles: Attr) -> Value:
        """`angles`: theta, or frequencies; and perhaps a magnitude."""
        return self.node("rope", (x, place), {"head_dim": head_dim, **angles}, "rope")

    def kv_write(
        self, k: Value, v: Value, place: Value, *, head_dim: int, window: int = 0
    ) -> Value:
        """A `window` of 0 is none: all positions are kept."""
        attrs: dict[str, Attr] = {"head_dim": head_dim, "to": "f32"}
        attrs |= {"window": window} if window else {}
        return self.node("kv_write", (k, v, place), attrs, "kv")

    def attention(
        self,
        q: Value,
        kv: Value,
        place: Value,
        *,
        head_dim: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        is_causal: bool = True,
    ) -> Value:
        """A `window` or `softcap` of 0 is none."""
        attrs: dict[str, Attr] = {"head_dim": head_dim, "scale": scale}
        attrs |= {"window": window} if window else {}
        attrs |= {"softcap": softcap} if softcap else {}
        attrs |= {} if is_causal else {"causal": False}
        return self.node("attention", (q, kv, place), attrs, "attention")

    def silu(self, x: Value) -> Value:
        return self.emit("silu", x)

    def gelu(self, x: Value) -> Value:
        return self.emit("gelu", x)

    def gelu_erf(self, x: Value) -> Value:
        return self.emit("gelu_erf", x)

    def scale(self, x: Value, by: float) -> Value:
        """x * by; x itself where that is 1."""
        return x if by == 1 else self.emit("scale", x, by=by)

    def softcap(self, x: Value, cap: float) -> Value:
        """cap * tanh(x / cap); x itself where the cap is 0."""
        return self.emit("softcap", x, cap=cap) if cap else x

    def route(self, logits: Value, *, top_k: int, renormalize: bool) -> Value:
        return self.emit("route", logits, name="routes", top_k=top_k, renormalize=renormalize)

    def group(self, routes: Value) -> Value:
        return self.emit("group", routes, name="groups")

    def dispatch(self, x: Value, groups: Value) -> Value:
        return self.emit("dispatch", x, groups)

    def expert_linear(self, x: Value, weight: Value, groups: Value) -> Value:
        return self.emit("expert_linear", x, weight, groups, name=weight.name[1:])

    def combine(self, y: Value, routes: Value, groups: Value) -> Value:
        return self.emit("combine", y, routes, groups)

    def shrink(self, x: Value, weight: Value, adapters: Value) -> Value:
        return self.emit("shrink", x, weight, adapters, name="low")

    def expand(self, y: Value, low: Value, weight: Value, adapters: Value) -> Value:
        return self.emit("expand", y, low, weight, adapters, name="adapted")

    def add(self, a: Value, b: Value) -> Value:
        return self.emit("add", a, b)

    def mul(self, a: Value, b: Value) -> Value:
        return self.emit("mul", a, b)

    def select_rows(self, x: Value, rows: Value) -> Value:
        return self.emit("select_rows", x, rows, name="rows")

    def sample(self, logits: Value, sampling: Value) -> Value:
        return self.emit("sample", logits, sampling)

    def repeat(
        self, count: int, body: "Callable[[FunctionBuilder, Value, Value], Value]", *operands: Value
    ) -> Value:
        """Run `body` `count` times on (x, place), each time with the next layer's weights."""
        return self.repeat_kinds(
            [None] * count, lambda f, _, x, place: body(f, x, place), *operands
        )

    def repeat_kinds(
        self,
        kinds: Sequence[Kind],
        body: "Callable[[FunctionBuilder, Kind, Value, Value], Value]",
        *operands: Value,
    ) -> Value:
        """Run a layer for each of `kinds`; layers of one kind share their body."""
        distinct = list(dict.fromkeys(kinds))
        names = Names()
        bodies = tuple(names.fresh("layer") for _ in distinct)
        for name, kind in zip(bodies, distinct, strict=True):
            inner = FunctionBuilder(name)
            x, place = (inner.param(o.name[1:], o.type.dtype, *o.type.shape) for o in operands)
            self.functions.append(inner.finish(body(inner, kind, x, place)))
        value = Value(self._names.fresh("%layers"), operands[0].type)
        attrs: Attrs = (
            ("prefix", "layers"),
            ("bodies", bodies),
            ("order", tuple(map(distinct.index, kinds))),
        )
        self._nodes.append(Node("repeat", tuple(o.name for o in operands), (value,), attrs))
        return value

    def finish(self, *returns: Value) -> Function:
        weights = tuple(self._weights.values())
        names = tuple(v.name for v in returns)
        return Function(self.name, tuple(self._params), weights, tuple(self._nodes), names)


def finish_graph(name: str, main: FunctionBuilder, *returns: Value) -> Graph:
    """The graph of a main function and the layer bodies it repeats."""
    return Graph(name, (main.finish(*returns), *main.functions))

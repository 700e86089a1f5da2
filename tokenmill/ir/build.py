"""Builds graphs: one method an operation, so that a model file reads like its paper."""

from collections.abc import Callable

from tokenmill.ir.graph import Attr, Function, Graph, Names, Node, Type, Value
from tokenmill.ir.ops import infer


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
        """A weight of this function; asking again for the same name gives the same one."""
        kind = Type("w" if len(shape) == 2 else "f32", shape)
        value = self._weights.setdefault(name, Value(f"@{name}", kind))
        assert value.type == kind, (value, kind)
        return value

    def emit(self, op: str, *operands: Value, name: str = "", **attrs: Attr) -> Value:
        names = tuple(o.name for o in operands)
        draft = Node(op, names, (), tuple(attrs.items()))
        kind = infer(draft, [o.type for o in operands])
        value = Value(self._names.fresh(f"%{name or op}"), kind)
        self._nodes.append(Node(op, names, (value,), draft.attrs))
        return value

    def embed(self, tokens: Value, table: Value) -> Value:
        return self.emit("embed", tokens, table)

    def rmsnorm(self, x: Value, weight: Value, *, eps: float) -> Value:
        return self.emit("rmsnorm", x, weight, eps=eps)

    def linear(self, x: Value, weight: Value, bias: Value | None = None) -> Value:
        operands = (x, weight) if bias is None else (x, weight, bias)
        return self.emit("linear", *operands, name=weight.name[1:])

    def rope(self, x: Value, place: Value, *, head_dim: int, theta: float) -> Value:
        return self.emit("rope", x, place, head_dim=head_dim, theta=theta)

    def kv_write(self, k: Value, v: Value, place: Value, *, head_dim: int) -> Value:
        return self.emit("kv_write", k, v, place, name="kv", head_dim=head_dim, to="f32")

    def attention(self, q: Value, kv: Value, place: Value, *, head_dim: int, scale: float) -> Value:
        return self.emit("attention", q, kv, place, head_dim=head_dim, scale=scale)

    def silu(self, x: Value) -> Value:
        return self.emit("silu", x)

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
        inner = FunctionBuilder("layer")
        x, place = (inner.param(o.name[1:], o.type.dtype, *o.type.shape) for o in operands)
        self.functions.append(inner.finish(body(inner, x, place)))
        value = Value(self._names.fresh("%layers"), operands[0].type)
        attrs = (("prefix", "layers"), ("bodies", ("layer",)), ("order", (0,) * count))
        self._nodes.append(Node("repeat", tuple(o.name for o in operands), (value,), attrs))
        return value

    def finish(self, *returns: Value) -> Function:
        weights = tuple(self._weights.values())
        names = tuple(v.name for v in returns)
        return Function(self.name, tuple(self._params), weights, tuple(self._nodes), names)


def finish_graph(name: str, main: FunctionBuilder, *returns: Value) -> Graph:
    """The graph of a main function and the layer bodies it repeats."""
    return Graph(name, (main.finish(*returns), *main.functions))

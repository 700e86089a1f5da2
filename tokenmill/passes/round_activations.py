"""Say where activations are rounded: before each linear, and on the way to the KV cache.

What an adapter has between its factors is rounded as those are.
"""

from dataclasses import replace

from tokenmill.ir.formats import FORMATS
from tokenmill.ir.graph import Function, Graph, Names, Node, Type, Value
from tokenmill.ir.low_rank import FACTORS

ROUNDED_FOR = {
    **{n: {a: a for a in ("f32", "bf16", "int8")} for n, f in FORMATS.items() if f.is_integer},
    "f8": {"f32": "f32", "bf16": "bf16", "int8": "bf16"},
    "bf16": {"f32": "f32", "bf16": "bf16", "int8": "bf16"},
    "f32": {"f32": "f32", "bf16": "f32", "int8": "f32"},
}
"""By weight format, then by the activation type asked for: what a linear's input becomes."""


def round_activations(graph: Graph, activations: str, cache: str) -> Graph:
    """`activations` and `cache`, the KV cache's type, are f32, bf16 or int8.

    Queries meet bf16 keys in the bf16 dot, so they are rounded too; others stay f32.
    """
    functions = (_round(f, activations, cache) for f in graph.functions)
    return replace(graph, functions=tuple(functions))


def _round(function: Function, activations: str, cache: str) -> Function:
    types = function.values
    rounder = _Rounder(types, Names(set(types)))
    changed = _changed_linears(function)
    for node in function.nodes:
        operands = node.operands
        if node.op in ("linear", "expert_linear"):
            to = ROUNDED_FOR[types[operands[1]].dtype][activations]
            operands = (rounder.rounded(operands[0], to), *operands[1:])
        elif node.op == "shrink":
            linear = changed.get(node.result.name)
            to = ROUNDED_FOR[types[linear.operands[1]].dtype][activations] if linear else "f32"
            operands = (rounder.rounded(operands[0], to), *operands[1:])
        elif node.op == "expand":
            low = rounder.rounded(operands[1], FACTORS[types[operands[2]].dtype])
            operands = (operands[0], low, *operands[2:])
        elif node.op == "kv_write":
            node = node.with_attrs(to=cache)
        elif node.op == "attention" and cache == "bf16":
            operands = (rounder.rounded(operands[0], cache), *operands[1:])
        rounder.nodes.append(replace(node, operands=operands))
    return function.with_nodes(rounder.nodes)


def _changed_linears(function: Function) -> dict[str, Node]:
    """The linear that each `shrink` belongs to, which sees the same input as it does."""
    makers = {v.name: n for n in function.nodes for v in n.results if n.op == "linear"}
    pairs = (n.operands[:2] for n in function.nodes if n.op == "expand")
    return {low: makers[whole] for whole, low in pairs if whole in makers}


class _Rounder:
    """Emits each rounding once, right before its first use."""

    def __init__(self, types: dict[str, Type], names: Names) -> None:
        self.types = types
        self.names = names
        self.nodes: list[Node] = []
        self._made: dict[tuple[str, str], str] = {}

    def rounded(self, name: str, to: str) -> str:
        """The name of the rounded value; a value that the model rounds itself stays as it is."""
        if self.types[name].dtype != "f32":
            return name
        key = (name, to)
        if key not in self._made:
            made = Value(self.names.fresh(f"{name}.{to}"), Type(to, self.types[name].shape))
            self.nodes.append(Node("round", (name,), (made,), (("to", to),)))
            self._made[key] = made.name
        return self._made[key]

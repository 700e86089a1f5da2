"""Remove what nobody uses, and compute what is asked for twice only once."""

from collections.abc import Mapping
from dataclasses import replace

from tokenmill.ir.graph import Function, Graph, Node, Value, fuse

_EFFECTS = ("kv_write", "repeat", "barrier")


def clean_up(graph: Graph) -> Graph:
    """Merge equal nodes, then drop nodes and weights without a use. Effects stay."""
    functions = (drop_dead(merge_equal(f)) for f in graph.functions)
    return replace(graph, functions=tuple(functions))


def merge_equal(function: Function) -> Function:
    """Nodes of the same operation, operands and attributes become one."""
    first: dict[tuple[object, ...], Value] = {}
    names: dict[str, str] = {}
    kept = []
    for node in function.nodes:
        node = _renamed(node, names)
        if node.op not in _EFFECTS and not node.body:
            key = (node.op, node.operands, node.attrs)
            value = first.setdefault(key, node.result)
            if value is not node.result:
                names[node.result.name] = value.name
                continue
        kept.append(node)
    returns = tuple(names.get(r, r) for r in function.returns)
    return replace(function, nodes=tuple(kept), returns=returns)


def _renamed(node: Node, names: Mapping[str, str]) -> Node:
    if node.body:
        return fuse([_renamed(leaf, names) for leaf in node.body], [v.name for v in node.results])
    return replace(node, operands=tuple(names.get(o, o) for o in node.operands))


def drop_dead(function: Function) -> Function:
    """Walk backwards and keep what is returned, used, or has an effect."""
    needed = set(function.returns)
    kept: list[Node] = []
    for node in reversed(function.nodes):
        has_effect = any(leaf.op in _EFFECTS for leaf in node.leaves)
        if has_effect or any(v.name in needed for v in node.results):
            needed.update(node.operands)
            kept.append(node)
    weights = tuple(w for w in function.weights if w.name in needed)
    return replace(function, nodes=tuple(reversed(kept)), weights=weights)

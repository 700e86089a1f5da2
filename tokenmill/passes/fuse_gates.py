"""Merge the gate and up projections, and apply the gate while both are in registers."""

from dataclasses import replace

from tokenmill.ir.graph import Function, Graph, Node
from tokenmill.passes.grouping import Links, group


def fuse_gates(graph: Graph) -> Graph:
    """round(mul(silu(linear(h)), linear(h))) becomes one node; gelu serves as well as silu."""
    return replace(graph, functions=tuple(_fuse(f) for f in graph.functions))


def _fuse(function: Function) -> Function:
    for product in [n for n in function.nodes if n.op == "mul"]:
        members = _members(Links.of(function), product)
        if members:
            function = group(function, members)
    return function


def _members(links: Links, product: Node) -> list[Node]:
    bend = links.maker(product.operands[0], "silu") or links.maker(product.operands[0], "gelu")
    up = links.maker(product.operands[1], "linear")
    gate = links.maker(bend.operands[0], "linear") if bend else None
    if bend is None or up is None or gate is None or gate.operands[0] != up.operands[0]:
        return []
    if any(links.only_user(node) is None for node in (gate, bend, up)):
        return []
    roundings = links.roundings(product)
    return [gate, bend, up, product, *(roundings if len(roundings) == 1 else [])]

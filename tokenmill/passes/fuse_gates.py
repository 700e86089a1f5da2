"""Merge the gate and up projections, and apply the gate while both are in registers.

Without a gate, the linear's result is bent while it is in registers.
"""

from dataclasses import replace

from tokenmill.ir.graph import Function, Graph, Node
from tokenmill.passes.grouping import Links, group


def fuse_gates(graph: Graph) -> Graph:
    """round(mul(silu(linear(h)), linear(h))) becomes one node; gelu serves as well as silu.

    So does round(gelu_erf(linear(h))).
    """
    return replace(graph, functions=tuple(_fuse(f) for f in graph.functions))


def _fuse(function: Function) -> Function:
    for product in [n for n in function.nodes if n.op == "mul"]:
        members = _members(Links.of(function), product)
        if members:
            function = group(function, members)
    for bend in [n for n in function.nodes if n.op == "gelu_erf"]:
        members = _plain_members(Links.of(function), bend)
        if members:
            function = group(function, members)
    return function


def _plain_members(links: Links, bend: Node) -> list[Node]:
    linear = links.maker(bend.operands[0], "linear")
    if linear is None or links.only_user(linear) is None:
        return []
    roundings = links.roundings(bend)
    return [linear, bend, *(roundings if len(roundings) == 1 else [])]


def _members(links: Links, product: Node) -> list[Node]:
    bend = links.maker(product.operands[0], "silu") or links.maker(product.operands[0], "gelu")
    up = _linear(links, product.operands[1])
    gate = _linear(links, bend.operands[0]) if bend else []
    if bend is None or not up or not gate or not _walk_alike(gate[0], up[0]):
        return []
    if any(links.only_user(node) is None for node in (*gate, bend, *up)):
        return []
    roundings = links.roundings(product)
    return [*gate, bend, *up, product, *(roundings if len(roundings) == 1 else [])]


def _linear(links: Links, name: str) -> list[Node]:
    """The linear, or the linears of experts, that make a value, and what adapters add to it."""
    added = links.maker(name, "expand")
    name = added.operands[0] if added else name
    linear = links.maker(name, "linear") or links.maker(name, "expert_linear")
    return [node for node in (linear, added) if node] if linear else []


def _walk_alike(gate: Node, up: Node) -> bool:
    """Do both read the same rows, those of experts for the same ones?"""
    is_same_input = gate.operands[0] == up.operands[0]
    is_same_group = gate.op == "linear" or gate.operands[2] == up.operands[2]
    return gate.op == up.op and is_same_input and is_same_group

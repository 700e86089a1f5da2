"""Add the residual to a linear's result before it is stored."""

from dataclasses import replace

from tokenmill.ir.graph import Function, Graph, Node
from tokenmill.passes.grouping import Links, group


def fuse_residuals(graph: Graph) -> Graph:
    """add(x, linear(h)) becomes one node, whichever side the linear is on."""
    return replace(graph, functions=tuple(_fuse(f) for f in graph.functions))


def _fuse(function: Function) -> Function:
    for total in [n for n in function.nodes if n.op == "add"]:
        linear = _private_linear(Links.of(function), total)
        if linear is not None:
            function = group(function, [linear, total])
    return function


def _private_linear(links: Links, total: Node) -> Node | None:
    if total.operands[0] == total.operands[1]:
        return None
    for name in reversed(total.operands):
        linear = links.maker(name, "linear")
        if linear is not None and links.only_user(linear) is total:
            return linear
    return None

"""Round attention's result as each head is finished."""

from dataclasses import replace

from tokenmill.ir.graph import Function, Graph
from tokenmill.ir.order import GROUP
from tokenmill.passes.grouping import Links, group


def fuse_attention(graph: Graph) -> Graph:
    """attention + round become one node where no rounding group straddles two heads."""
    return replace(graph, functions=tuple(_fuse(f) for f in graph.functions))


def _fuse(function: Function) -> Function:
    for node in [n for n in function.nodes if n.op == "attention"]:
        roundings = Links.of(function).roundings(node)
        if len(roundings) == 1 and node.integer("head_dim") % GROUP == 0:
            function = group(function, [node, *roundings])
    return function

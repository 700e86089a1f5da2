"""Fuse a norm, a dispatch or a shrink with the rounding of its result: one walk over each row."""

from dataclasses import replace

from tokenmill.ir.graph import Function, Graph
from tokenmill.passes.grouping import Links, group


def fuse_norms(graph: Graph) -> Graph:
    return replace(graph, functions=tuple(_fuse(f) for f in graph.functions))


def _fuse(function: Function) -> Function:
    for norm in [n for n in function.nodes if n.op in ("rmsnorm", "dispatch", "shrink")]:
        roundings = Links.of(function).roundings(norm)
        if len(roundings) == 1:
            function = group(function, [norm, *roundings])
    for norm in [n for n in function.nodes if n.op == "layer_norm"]:
        # Models that norm last add the result itself to what follows, so it stays visible.
        users = Links.of(function).users.get(norm.result.name, [])
        roundings = [user for user in users if user.op == "round"]
        if len(roundings) == 1 and users[0] is roundings[0]:
            function = group(function, [norm, *roundings])
    return function

"""Scale a linear's result, and add what adapters make and the residual, before it is stored."""

from dataclasses import replace

from tokenmill.ir.graph import Function, Graph, Node
from tokenmill.passes.grouping import Links, group

_BENDS = ("expand", "scale", "softcap")


def fuse_residuals(graph: Graph) -> Graph:
    """add(x, linear(h)) becomes one node, whichever side the linear is on.

    Between the two, or alone behind the linear, may stand expand, scale and softcap.
    """
    return replace(graph, functions=tuple(_fuse(f) for f in graph.functions))


def _fuse(function: Function) -> Function:
    for total in [n for n in function.nodes if n.op in ("add", *_BENDS)]:
        if total.op == "add" or _only_bend(Links.of(function), total):
            function = _with_linear(function, total)
    for expand in [n for n in function.nodes if n.op == "expand"]:
        function = _with_linear(function, expand)  # whose sums it changes in their place
    return function


def _with_linear(function: Function, total: Node) -> Function:
    members = _private_linear(Links.of(function), total)
    return group(function, [*members, total]) if members else function


def _only_bend(links: Links, node: Node) -> bool:
    """No node follows that takes this one in itself."""
    user = links.only_user(node)
    return user is None or user.op not in ("add", *_BENDS)


def _private_linear(links: Links, total: Node) -> list[Node]:
    """A linear that leads to an operand and nowhere else, and what stands between."""
    if len(set(total.operands)) < len(total.operands):
        return []
    chains = (_chain(links, name, total) for name in reversed(total.operands))
    return next(filter(None, chains), [])


def _chain(links: Links, name: str, user: Node) -> list[Node]:
    """The nodes from a linear to the value, if nobody but `user` takes part."""
    node = links.makers.get(name)
    if node is None or node.op not in ("linear", *_BENDS) or links.only_user(node) is not user:
        return []
    if node.op == "linear":
        return [node]
    before = _chain(links, node.operands[0], node)
    return [*before, node] if before else []

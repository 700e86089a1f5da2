"""Merge the q, k and v projections; turn and store their results while they are in registers."""

from dataclasses import replace

from tokenmill.ir.graph import Function, Graph, Node
from tokenmill.passes.grouping import Links, group


def fuse_qkv(graph: Graph) -> Graph:
    """linear x 3 (and what adapters add), rope x 2, rounding of q and kv_write become one node."""
    return replace(graph, functions=tuple(_fuse(f) for f in graph.functions))


def _fuse(function: Function) -> Function:
    for write in [n for n in function.nodes if n.op == "kv_write"]:
        members = _members(Links.of(function), write)
        if members:
            function = group(function, members)
    return function


def _members(links: Links, write: Node) -> list[Node]:
    """Every node of the pattern around a kv_write, or nothing."""
    reader = links.only_user(write)
    if reader is None or reader.op != "attention":
        return []
    chains = (
        _projection(links, reader.operands[0], ("round", "rope", "expand", "linear")),
        _projection(links, write.operands[0], ("rope", "expand", "linear")),
        _projection(links, write.operands[1], ("expand", "linear")),
    )
    linears = [chain[0] for chain in chains if chain]
    members = [*(node for chain in chains for node in chain), write]
    are_three = len({n.result.name for n in linears}) == 3
    is_one_input = len({n.operands[0] for n in linears}) == 1
    heads = {n.integer("head_dim") for n in members if n.op in ("rope", "kv_write")}
    return members if are_three and is_one_input and len(heads) == 1 else []


def _projection(links: Links, name: str, ops: tuple[str, ...]) -> list[Node]:
    """The nodes of these kinds that lead to a value, each with no other user; a linear first."""
    chain: list[Node] = []
    for op in ops:
        node = links.maker(name, op)
        if node is None:
            continue
        if links.only_user(node) is None:
            return []
        chain.insert(0, node)
        name = node.operands[0]
    return chain if chain and chain[0].op == "linear" else []

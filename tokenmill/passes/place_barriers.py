"""Put a barrier where one thread may read what another wrote.

Threads share each phase's work by its own split: rows of the leading sizes (tokens, their experts,
or rows with logits), output units of a linear, or items of attention. Two phases in a row that
split the same rows in the same way need no barrier between them. A layer starts and ends with all
threads level.
"""

from dataclasses import replace

from tokenmill.ir.graph import Function, Graph, Node, layer_bodies

_BARRIER = Node("barrier", (), ())


def place_barriers(graph: Graph) -> Graph:
    bodies = {b for n in graph.main.nodes if n.op == "repeat" for b in layer_bodies(n)}
    functions = (_place(f, is_body=f.name in bodies) for f in graph.functions)
    return replace(graph, functions=tuple(functions))


def split_of(node: Node) -> str:
    """How threads share the work of a node: `rows:T`, `rows:R`, or the node's own way."""
    ops = {leaf.op for leaf in node.leaves}
    if ops & {"linear", "expert_linear", "shrink", "group", "attention", "repeat"}:
        return f"own:{node.results[0].name}"
    if ops & {"kv_write", "route"}:
        return "rows:T"
    return f"rows:{','.join(map(str, node.results[0].type.rows or node.results[0].type.shape))}"


def _place(function: Function, *, is_body: bool) -> Function:
    nodes: list[Node] = []
    fresh: dict[str, str] = {}
    for node in function.nodes:
        split = split_of(node)
        if node.op == "repeat" or any(fresh.get(o, split) != split for o in node.operands):
            if fresh:
                nodes.append(_BARRIER)
            fresh = {}
        nodes.append(node)
        if node.op != "repeat":
            fresh.update((v.name, split) for v in node.results)
    if is_body:
        nodes.append(_BARRIER)
    return function.with_nodes(nodes)

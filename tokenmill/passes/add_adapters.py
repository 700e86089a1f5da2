"""Give linears room for the low-rank changes of adapters (LoRA, Hu et al. 2021).

Without this pass a graph knows nothing of adapters, and its program is what it always was.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from tokenmill.ir.graph import Function, Graph, Names, Node, Type, Value, layer_bodies

LOW_RANK_OPS = ("shrink", "expand")
"""What this pass alone makes."""
A, B = ".lora_a", ".lora_b"
"""Ends of the names of a weight's two factors."""
_ADAPTERS = Value("%adapters", Type("adapters", ("T",)))


@dataclass(frozen=True, kw_only=True)
class AdapterRoom:
    """How many adapters a step can hold, and the largest rank that they may have.

    `dtype` is the type of their factors, one of low_rank.FACTORS.
    """

    slots: int
    rank: int
    dtype: str = "lora"


def add_adapters(graph: Graph, room: AdapterRoom, targets: Collection[str]) -> Graph:
    """y = linear(x, @q) becomes expand(y, shrink(x, @q.lora_a), @q.lora_b) where q is a target.

    Only layers have targets: a name stands for that weight in each of them.
    """
    bodies = {b for n in graph.main.nodes if n.op == "repeat" for b in layer_bodies(n)}
    main, *others = graph.functions
    nodes = [
        replace(node, operands=(*node.operands, _ADAPTERS.name)) if node.op == "repeat" else node
        for node in main.nodes
    ]
    main = replace(main, params=(*main.params, _ADAPTERS), nodes=tuple(nodes))
    layers = (_add(f, room, targets) if f.name in bodies else f for f in others)
    return replace(graph, functions=(main, *layers))


def adaptable(graph: Graph, targets: Collection[str]) -> dict[str, tuple[int, int]]:
    """The outputs and inputs of each weight, by full name, that adapters could change."""
    found = {}
    for node in graph.main.nodes:
        for index, body in enumerate(layer_bodies(node) if node.op == "repeat" else ()):
            for weight in _targets(graph.function(body), targets):
                n, k = map(int, weight.type.shape)
                found[f"{node.string('prefix')}.{index}.{weight.name[1:]}"] = (n, k)
    return found


def _targets(function: Function, targets: Collection[str]) -> Iterator[Value]:
    read = {node.operands[1] for node in function.nodes if node.op == "linear"}
    return (w for w in function.weights if w.name in read and w.name[1:] in targets)


def _add(function: Function, room: AdapterRoom, targets: Collection[str]) -> Function:
    """The function with both operations around each linear of a target's."""
    names = Names(set(function.values))
    found = {w.name: w.type for w in _targets(function, targets)}
    weights, nodes = dict.fromkeys(function.weights), []
    for node in function.nodes:
        if node.op != "linear" or node.operands[1] not in found:
            nodes.append(node)
            continue
        n, k = map(int, found[node.operands[1]].shape)
        a = Value(node.operands[1] + A, Type(room.dtype, (room.slots, room.rank, k)))
        b = Value(node.operands[1] + B, Type(room.dtype, (room.slots, n, room.rank)))
        weights |= dict.fromkeys((a, b))  # once, where several linears share a weight
        nodes += _around(node, a, b, names)
    params = (*function.params, _ADAPTERS)
    return replace(function, params=params, weights=tuple(weights), nodes=tuple(nodes))


def _around(linear: Node, a: Value, b: Value, names: Names) -> list[Node]:
    """Shrink, the linear under another name, and expand under the linear's."""
    result = linear.result
    rows, rank = result.type.rows, a.type.shape[1]
    low = Value(names.fresh(f"{result.name}.low"), Type("f32", (*rows, rank)))
    whole = Value(names.fresh(f"{result.name}.base"), result.type)
    return [
        Node("shrink", (linear.operands[0], a.name, _ADAPTERS.name), (low,)),
        replace(linear, results=(whole,)),
        Node("expand", (whole.name, low.name, b.name, _ADAPTERS.name), (result,)),
    ]

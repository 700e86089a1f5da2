"""Give every weight the format that its loaded tensor has.

Layers whose formats differ cannot share a body: a body is copied for each combination found.
"""

from collections.abc import Mapping
from dataclasses import replace

from tokenmill.ir.graph import Function, Graph, Names, Node, Type, Value, layer_bodies, layer_weight


def choose_formats(graph: Graph, formats: Mapping[str, str]) -> Graph:
    """`formats` names the format of each matrix by its full name; vectors stay f32."""
    bodies: list[Function] = []
    names = Names({graph.main.name})
    nodes = []
    for node in graph.main.nodes:
        if node.op == "repeat":
            node, made = _split(graph, node, formats, names)
            bodies.extend(made)
        nodes.append(node)
    main = _with_formats(graph.main, {w.name: w.name[1:] for w in graph.main.weights}, formats)
    return replace(graph, functions=(main.with_nodes(nodes), *bodies))


def _split(
    graph: Graph, repeat: Node, formats: Mapping[str, str], names: Names
) -> tuple[Node, list[Function]]:
    """One body a combination of formats, in the order in which layers first need it."""
    made: list[Function] = []
    order = []
    for index, name in enumerate(layer_bodies(repeat)):
        body = graph.function(name)
        full = {w.name: layer_weight(repeat, index, w.name) for w in body.weights}
        typed = _with_formats(body, full, formats)
        same = [i for i, b in enumerate(made) if replace(b, name=name) == typed]
        if not same:
            same = [len(made)]
            made.append(replace(typed, name=names.fresh(name)))
        order.append(same[0])
    bodies = tuple(b.name for b in made)
    return repeat.with_attrs(bodies=bodies, order=tuple(order)), made


def _with_formats(
    function: Function, full_names: Mapping[str, str], formats: Mapping[str, str]
) -> Function:
    weights = []
    for weight in function.weights:
        dtype = weight.type.dtype
        if dtype == "w":
            dtype = formats[full_names[weight.name]]
        weights.append(Value(weight.name, Type(dtype, weight.type.shape)))
    return replace(function, weights=tuple(weights))

"""Give the last hidden states of some tokens, beside the logits of others.

A decoder's `main` ends in select_rows, a norm and the head. The selection and the norm are put
there once more, for the tokens `i32[E]` that are to be pooled; everything else stays as it is.
"""

from dataclasses import replace

from tokenmill.ir.graph import Function, Graph, Names, Node, Type, Value


def return_hidden(graph: Graph) -> Graph:
    """`main` takes %pooled: i32[E] too, and returns the normed states f32[E,K] last.

    Raises ValueError for a graph that does not end so.
    """
    main = graph.main
    selection = _reader(main, {p.name for p in main.params if p.type == Type("i32", ("R",))})
    norm = _reader(main, {selection.result.name})
    names = Names(set(main.values))
    pooled = Value(names.fresh("%pooled"), Type("i32", ("E",)))
    states = [
        Value(names.fresh(f"{node.result.name}.pooled"), _of_pooled(node.result.type))
        for node in (selection, norm)
    ]
    nodes = (
        Node("select_rows", (selection.operands[0], pooled.name), (states[0],)),
        Node(norm.op, (states[0].name, *norm.operands[1:]), (states[1],), norm.attrs),
    )
    changed = replace(
        main,
        params=(*main.params, pooled),
        nodes=(*main.nodes, *nodes),
        returns=(*main.returns, states[1].name),
    )
    return replace(graph, functions=(changed, *graph.functions[1:]))


def _reader(main: Function, names: set[str]) -> Node:
    """The one node that reads one of these values."""
    readers = [n for n in main.nodes if names & set(n.operands)]
    if len(readers) != 1:
        raise ValueError(f"{len(readers)} nodes read {', '.join(sorted(names)) or 'rows'}")
    return readers[0]


def _of_pooled(kind: Type) -> Type:
    return Type(kind.dtype, ("E", *kind.shape[1:]))

"""What the passes do to one value: the node that makes it, before and after each of them."""

import inspect
import sys
from dataclasses import dataclass
from functools import partial

from tokenmill.ir.graph import Function, Graph, Node
from tokenmill.ir.text import print_node
from tokenmill.passes.pipeline import NamedPass, Pass, run_passes


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A value after one pass (number 0: as built): its node and the neighbours it needs.

    `lines` are the text of those nodes, `operands` the values that go in, with their types;
    both are empty while the value does not exist.
    """

    number: int
    name: str
    summary: str
    lines: tuple[str, ...] = ()
    operands: tuple[str, ...] = ()
    core: tuple[str, ...] = ()

    def differs(self, other: "Stage") -> bool:
        """Whether the value's own node, its barriers or its operands' types have changed."""
        return (self.core, self.operands) != (other.core, other.operands)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A node, the function it stands in, and the name of the pass that made it."""

    by: str
    function: str
    node: Node


def trace_value(
    graph: Graph, passes: tuple[NamedPass, ...], function: str, value: str
) -> tuple[list[Stage], Graph]:
    """The value as built and after each pass that changed it; and the graph after all passes."""
    stages = [_stage(0, "", "", graph.function(function), value)]

    def look(name: str, graph: Graph) -> None:
        number = next(i for i, (other, _) in enumerate(passes, start=1) if other == name)
        summary = summary_of(passes[number - 1][1])
        stage = _stage(number, name, summary, graph.function(function), value)
        if stage.differs(stages[-1]):
            stages.append(stage)

    return stages, run_passes(graph, passes, look)


def first_made(graph: Graph, passes: tuple[NamedPass, ...], op: str) -> Made | None:
    """Where an operation that only passes make comes up first; None if none of them makes it."""
    found: list[Made] = []

    def look(name: str, graph: Graph) -> None:
        if not found:
            found.extend(
                Made(by=name, function=function.name, node=leaf)
                for function in (*graph.functions[1:], graph.main)
                for node in function.nodes
                for leaf in node.leaves
                if leaf.op == op
            )

    run_passes(graph, passes, look)
    return found[0] if found else None


def summary_of(run: Pass) -> str:
    """The first sentence of a pass's module."""
    function = run.func if isinstance(run, partial) else run
    text = inspect.getdoc(sys.modules[function.__module__]) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def node_of(function: Function, value: str) -> tuple[int, Node] | None:
    """Where in the function a value is made, and the node, fused or plain, that makes it."""
    for index, node in enumerate(function.nodes):
        if leaf_of(node, value) is not None:
            return index, node
    return None


def leaf_of(node: Node, value: str) -> Node | None:
    """The plain node inside `node` that makes a value."""
    return next((n for n in node.leaves if any(v.name == value for v in n.results)), None)


def _stage(number: int, name: str, summary: str, function: Function, value: str) -> Stage:
    found = node_of(function, value)
    if found is None:
        return Stage(number=number, name=name, summary=summary)
    index, node = found
    leaf = leaf_of(node, value)
    assert leaf is not None
    before, after = function.nodes[:index][-1:], function.nodes[index + 1 : index + 2]
    core = [*_barriers(before), node, *_barriers(after)]
    types = function.values
    return Stage(
        number=number,
        name=name,
        summary=summary,
        lines=_text([*_roundings(function, leaf), *core]),
        operands=tuple(f"{name}: {types[name]}" for name in leaf.operands),
        core=_text(core),
    )


def _roundings(function: Function, leaf: Node) -> list[Node]:
    """Plain nodes that round what a node reads."""
    return [n for n in function.nodes if n.op == "round" and n.result.name in leaf.operands]


def _barriers(nodes: tuple[Node, ...]) -> list[Node]:
    return [n for n in nodes if n.op == "barrier"]


def _text(nodes: list[Node]) -> tuple[str, ...]:
    return tuple(line for node in nodes for line in print_node(node).splitlines())

"""What a legal graph is. In tests this runs between every two passes."""

import re
from collections.abc import Iterable

from tokenmill.ir.formats import FORMATS
from tokenmill.ir.graph import Dim, Function, Graph, Node, Type, Value, fuse, layer_bodies, walk
from tokenmill.ir.low_rank import FACTORS
from tokenmill.ir.ops import STRUCTURE, infer
from tokenmill.ir.type_rules import ACTIVATIONS, TypeMismatchError

_NAME = re.compile(r"[\w.]+")
_HANDLES = ("place", "sampling", "kv", "routes", "groups", "adapters")
_DTYPES = (*ACTIVATIONS, *FORMATS, "w", *FACTORS, "i32", *_HANDLES)
_SYMBOLS = ("T", "R", "S", "E")
_REPEAT_ATTRS = {"prefix": str, "bodies": tuple, "order": tuple}


class IllegalGraphError(ValueError):
    """The graph breaks a rule; says the function, the value and the rule."""


def verify(graph: Graph) -> None:
    """Raise IllegalGraphError unless the graph is legal."""
    names = [f.name for f in graph.functions]
    if not names or len(set(names)) != len(names):
        raise IllegalGraphError(f"graph {graph.name}: no function, or two of one name: {names}")
    for function in graph.functions:
        _Verifier(graph, function).run()
    prefixes = [n.string("prefix") for n in graph.main.nodes if n.op == "repeat"]
    if len(set(prefixes)) != len(prefixes):
        raise IllegalGraphError(f"main: two repeats of one prefix: {prefixes}")


class _Verifier:
    """Walks one function. `known` are the values that may be used, `taken` all names so far."""

    def __init__(self, graph: Graph, function: Function) -> None:
        self.graph = graph
        self.function = function
        self.known: dict[str, Type] = {}
        self.taken: set[str] = set()

    def run(self) -> None:
        self.define(self.function.params, "%")
        self.define(self.function.weights, "@")
        for node in self.function.nodes:
            self.node(node)
        for name in self.function.returns:
            self.require(name in self.known, f"returns {name}, which is never made")
        writes = sum(node.op == "kv_write" for node in walk(self.function.nodes))
        self.require(writes <= 1, "a layer has one cache, but kv_write stands here twice")

    def node(self, node: Node) -> None:
        for name in node.operands:
            self.require(name in self.known, f"{node.op} uses {name} before it is made")
        if node.op == "fused":
            self.fused(node)
            return
        if node.op == "repeat":
            self.repeat(node)
        elif node.op == "barrier":
            self.require(node == Node("barrier", (), ()), "a barrier takes and makes nothing")
        else:
            self.plain(node)
        self.define(node.results, "%")

    def plain(self, node: Node) -> None:
        where = ", ".join(v.name for v in node.results) or node.op
        self.require(len(node.results) == 1, f"{where}: {node.op} makes one value")
        try:
            kind = infer(node, [self.known[name] for name in node.operands])
        except TypeMismatchError as error:
            raise IllegalGraphError(f"{self.function.name}: {where}: {error}") from error
        stated = node.result.type
        self.require(stated == kind, f"{where} is stated {stated}, but is {kind}")

    def fused(self, node: Node) -> None:
        outside = dict(self.known)
        for leaf in node.body:
            self.require(leaf.op not in STRUCTURE, f"fused holds a {leaf.op}")
            self.node(leaf)
        shown = [v.name for v in node.results]
        self.require(bool(shown), "fused shows nothing")
        self.require(node == fuse(node.body, shown), f"fused {shown} does not fit its body")
        self.known = outside | {v.name: v.type for v in node.results}

    def repeat(self, node: Node) -> None:
        self.require(self.function is self.graph.main, "only main may repeat")
        kinds = {key: type(value) for key, value in node.attrs}
        self.require(kinds == _REPEAT_ATTRS, f"repeat takes {', '.join(_REPEAT_ATTRS)}")
        given = [self.known[name] for name in node.operands]
        self.require([v.type for v in node.results] == given[:1], "repeat gives its first operand")
        for name in self.bodies(node):
            body = self.graph.function(name)
            wanted = [p.type for p in body.params]
            self.require(wanted == given, f"repeat gives {name} {given}, wanted {wanted}")
            returned = [body.values.get(r) for r in body.returns]
            self.require(returned == given[:1], f"{name} must return its first parameter's type")

    def bodies(self, repeat: Node) -> list[str]:
        """The functions that a repeat runs, its attributes checked."""
        bodies, order = repeat.attr("bodies"), repeat.attr("order")
        assert isinstance(bodies, tuple)
        assert isinstance(order, tuple)
        names = [f.name for f in self.graph.functions[1:]]
        for name in bodies:
            self.require(name in names, f"repeat runs {name}, which is no layer")
        kinds = range(len(bodies))
        self.require(all(kind in kinds for kind in order), f"repeat's order {order} leaves {kinds}")
        return layer_bodies(repeat)

    def define(self, values: Iterable[Value], sign: str) -> None:
        for value in values:
            is_name = value.name[:1] == sign and _NAME.fullmatch(value.name[1:]) is not None
            self.require(is_name, f"{value.name!r} is no name of the form {sign}name")
            self.require(_is_legal(value.type), f"{value.name} has no legal type: {value.type}")
            self.require(value.name not in self.taken, f"{value.name} is made twice")
            self.taken.add(value.name)
            self.known[value.name] = value.type

    def require(self, holds: bool, message: str) -> None:
        if not holds:
            raise IllegalGraphError(f"{self.function.name}: {message}")


def _is_legal(kind: Type) -> bool:
    return kind.dtype in _DTYPES and all(_is_size(dim) for dim in kind.shape)


def _is_size(dim: Dim) -> bool:
    return dim in _SYMBOLS if isinstance(dim, str) else dim > 0

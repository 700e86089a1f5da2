"""The text form of a graph, exact both ways: `parse(print_graph(g)) == g`.

    graph tiny {
      func main(%tokens: i32[T], %where: place[T]) weights(@embed: q8[512,64]) {
        %x = embed(%tokens, @embed) : f32[T,64]
        return %x
      }
    }

Attributes stand in braces as Python literals; a fused node holds its nodes in braces.
"""

import ast
import re
from collections.abc import Iterable

from tokenmill.ir.graph import Attr, Attrs, Function, Graph, Node, Type, Value, fuse

_NAME = r"[%@][\w.]+"
_NAMES = rf"{_NAME}(?:, {_NAME})*"
_GRAPH = re.compile(r"graph (\S+) \{")
_HEAD = re.compile(r"func ([\w.]+)\((.*?)\)(?: weights\((.+)\))? \{")
_NODE = re.compile(rf"(?:({_NAMES}) = )?(\w+)\(({_NAMES})?\)(?: \{{(.+)\}})?(?: : (\S.*))?")
_FUSED = re.compile(rf"({_NAMES}) = fused \{{")
_RETURN = re.compile(rf"return(?: ({_NAMES}))?")


def print_graph(graph: Graph) -> str:
    """The graph as text, one node a line."""
    lines = [f"graph {graph.name} {{"]
    for function in graph.functions:
        lines.extend("  " + line for line in print_function(function).splitlines())
    return "\n".join([*lines, "}"]) + "\n"


def print_function(function: Function) -> str:
    """One function as text."""
    weights = f" weights({_values(function.weights)})" if function.weights else ""
    lines = [f"func {function.name}({_values(function.params)}){weights} {{"]
    for node in function.nodes:
        lines.extend("  " + line for line in print_node(node).splitlines())
    return "\n".join([*lines, f"  return {', '.join(function.returns)}", "}"])


def print_node(node: Node) -> str:
    """One node as text; a fused one takes several lines."""
    names = ", ".join(v.name for v in node.results)
    if node.op == "fused":
        inner = ["  " + print_node(leaf) for leaf in node.body]
        return "\n".join([f"{names} = fused {{", *inner, "}"])
    attrs = ", ".join(f"{key}={value!r}" for key, value in node.attrs)
    text = f"{node.op}({', '.join(node.operands)})" + (f" {{{attrs}}}" if attrs else "")
    types = ", ".join(str(v.type) for v in node.results)
    return f"{names} = {text} : {types}" if names else text


def _values(values: Iterable[Value]) -> str:
    return ", ".join(f"{v.name}: {v.type}" for v in values)


class GraphSyntaxError(ValueError):
    """The text is no graph; says the line and what was expected."""


class _Lines:
    """The text line by line, with line numbers for messages."""

    def __init__(self, text: str) -> None:
        numbered = enumerate((line.strip() for line in text.splitlines()), start=1)
        self._rest = [(n, line) for n, line in numbered if line and not line.startswith("//")]
        self._rest.reverse()
        self._line = ""

    def take(self, expected: str) -> str:
        if not self._rest:
            raise GraphSyntaxError(f"the text ends where {expected} was expected")
        self.number, self._line = self._rest.pop()
        return self._line

    def match(self, pattern: re.Pattern[str], expected: str) -> re.Match[str]:
        """The last line taken, matched as a whole."""
        found = pattern.fullmatch(self._line)
        if found is None:
            raise self.fail(expected)
        return found

    def is_at(self, pattern: re.Pattern[str]) -> bool:
        return pattern.fullmatch(self._line) is not None

    def fail(self, expected: str) -> GraphSyntaxError:
        return GraphSyntaxError(f"line {self.number}: expected {expected}, found {self._line!r}")

    def end(self) -> None:
        if self._rest:
            self.take("")
            raise self.fail("the end of the text")


def parse(text: str) -> Graph:
    """Read a graph back. Raises GraphSyntaxError."""
    lines = _Lines(text)
    lines.take("graph NAME {")
    name = lines.match(_GRAPH, "graph NAME {")[1]
    functions = []
    while lines.take("func or }") != "}":
        functions.append(_parse_function(lines))
    lines.end()
    return Graph(name, tuple(functions))


def _parse_function(lines: _Lines) -> Function:
    head = lines.match(_HEAD, "func NAME(...) {")
    params, weights = _parse_values(head[2], lines), _parse_values(head[3], lines)
    nodes = []
    while not lines.take("a node or return").startswith("return"):
        nodes.append(_parse_node(lines))
    returns = _split(lines.match(_RETURN, "return %x, ...")[1])
    if lines.take("}") != "}":
        raise lines.fail("}")
    return Function(head[1], params, weights, tuple(nodes), returns)


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(text.split(", ")) if text else ()


def _parse_values(text: str | None, lines: _Lines) -> tuple[Value, ...]:
    pairs = [part.partition(": ") for part in _split(text)]
    if not all(re.fullmatch(_NAME, name) for name, _, _ in pairs):
        raise lines.fail("%name: type, ...")
    return tuple(Value(name, _parse_type(kind, lines)) for name, _, kind in pairs)


def _parse_type(text: str, lines: _Lines) -> Type:
    try:
        return Type.parse(text)
    except ValueError:
        raise lines.fail("a type such as f32[T,64]") from None


def _parse_node(lines: _Lines) -> Node:
    if lines.is_at(_FUSED):
        return _parse_fused(lines)
    match = lines.match(_NODE, "%x = op(...) : type")
    names, operands, types = _split(match[1]), _split(match[3]), _split(match[5])
    if len(names) != len(types):
        raise lines.fail("one type for each result")
    kinds = (_parse_type(kind, lines) for kind in types)
    results = tuple(Value(name, kind) for name, kind in zip(names, kinds, strict=True))
    return Node(match[2], operands, results, _parse_attrs(match[4] or "", lines))


def _parse_fused(lines: _Lines) -> Node:
    names = _split(lines.match(_FUSED, "%x = fused {")[1])
    body: list[Node] = []
    while lines.take("a node or }") != "}":
        body.append(_parse_node(lines))
    made = {v.name for node in body for v in node.results}
    missing = [n for n in names if n not in made]
    if missing:
        raise GraphSyntaxError(f"line {lines.number}: fused shows {missing[0]}, never made inside")
    return fuse(body, names)


def _parse_attrs(text: str, lines: _Lines) -> Attrs:
    """Attributes are the keyword arguments of a Python call."""
    try:
        call = ast.parse(f"_({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("not a list of attributes")
        return tuple(_parse_attr(keyword) for keyword in call.keywords)
    except (SyntaxError, ValueError):
        raise lines.fail("attributes such as {head_dim=64, to='bf16'}") from None


def _parse_attr(keyword: ast.keyword) -> tuple[str, Attr]:
    value = ast.literal_eval(keyword.value)
    if keyword.arg is None or not isinstance(value, int | float | str | tuple):
        raise ValueError("not an attribute")
    return keyword.arg, value

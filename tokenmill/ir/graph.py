"""The graph: typed values in SSA form, in plain frozen dataclasses.

A graph is a few functions. `main` is the step; a function that `repeat` names is the body of a
run of layers, and its weight `@q` stands for `layers.0.q`, `layers.1.q` and so on. Sizes may be
symbolic: `T` tokens in the step, `R` rows whose logits are wanted, `S` sequences, `E` tokens whose
last hidden states are wanted. Of a step that a backend runs, `main` takes the tokens `i32[T]`,
their `place[T]`, and the rows `i32[R]` and `sampling[R]`, and returns the logits first; or it takes
the tokens `i32[E]` to be pooled and returns their states `f32[E,K]`; or does both.

A value is known by its name (`%x`), a weight by its own (`@embed`); names are unique in a
function, the inside of a `fused` node included. A `fused` node shows the results of some of the
nodes inside it to the outside.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

Dim = int | str
Attr = int | float | str | bool | tuple[int, ...] | tuple[float, ...] | tuple[str, ...]
Attrs = tuple[tuple[str, Attr], ...]

_TYPE = re.compile(r"(\w+)(?:\[(\w+(?:,\w+)*)\])?", re.ASCII)


@dataclass(frozen=True)
class Type:
    """An element type and a shape.

    Element types: `f32 bf16 i32`; `int8`, activations in groups with a scale each; the weight
    formats of `formats.py`, and `w`, a weight whose format is not chosen yet; and handles:
    `place` (where each token stands), `sampling` (how each row is sampled), `kv[G,D]` (a layer's
    cache of G heads) and `kv[G,D,W]` (one of which only the last W positions are read again),
    `routes[T,K,E]` (K of E experts for each token, and their weights), `groups[T,K,E]` (where each
    of the T * K pairs of token and expert stands among the others of its expert), `adapters[T]`
    (whose adapter each token has). `lora` is one factor of the low-rank changes that S adapters
    make to a linear: A is `lora[S,R,K]` and B is `lora[S,N,R]`, for ranks of R at most; `lora16` is
    the same, rounded to bfloat16.
    """

    dtype: str
    shape: tuple[Dim, ...] = ()

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]" if self.shape else self.dtype

    @property
    def width(self) -> int:
        """The last size: that of a row."""
        return int(self.shape[-1])

    @property
    def rows(self) -> tuple[Dim, ...]:
        """The sizes before the last."""
        return self.shape[:-1]

    @staticmethod
    def parse(text: str) -> "Type":
        match = _TYPE.fullmatch(text)
        if match is None:
            raise ValueError(f"not a type: {text!r}")
        dims = match[2].split(",") if match[2] else []
        return Type(match[1], tuple(int(d) if d.isdigit() else d for d in dims))


@dataclass(frozen=True)
class Value:
    """A name (with its % or @) and a type."""

    name: str
    type: Type


@dataclass(frozen=True)
class Node:
    """One operation. Only `fused` has a body; its operands are those of its body."""

    op: str
    operands: tuple[str, ...]
    results: tuple[Value, ...]
    attrs: Attrs = ()
    body: tuple["Node", ...] = ()

    def attr(self, name: str) -> Attr:
        for key, value in self.attrs:
            if key == name:
                return value
        raise KeyError(f"{self.op} has no attribute {name}")

    def integer(self, name: str) -> int:
        value = self.attr(name)
        assert isinstance(value, int), (self.op, name, value)
        return value

    def real(self, name: str) -> float:
        value = self.attr(name)
        assert isinstance(value, int | float), (self.op, name, value)
        return float(value)

    def string(self, name: str) -> str:
        value = self.attr(name)
        assert isinstance(value, str), (self.op, name, value)
        return value

    @property
    def result(self) -> Value:
        [value] = self.results
        return value

    @property
    def leaves(self) -> tuple["Node", ...]:
        """The plain operations that this node stands for."""
        return self.body or (self,)

    def with_attrs(self, **attrs: Attr) -> "Node":
        return replace(self, attrs=tuple((dict(self.attrs) | attrs).items()))


@dataclass(frozen=True)
class Function:
    """Parameters and weights in, nodes in order, named values out."""

    name: str
    params: tuple[Value, ...]
    weights: tuple[Value, ...]
    nodes: tuple[Node, ...]
    returns: tuple[str, ...]

    @property
    def values(self) -> dict[str, Type]:
        """The type of everything that has a name here."""
        table = {v.name: v.type for v in (*self.params, *self.weights)}
        for node in walk(self.nodes):
            table.update((v.name, v.type) for v in node.results)
        return table

    def with_nodes(self, nodes: Iterable[Node]) -> "Function":
        return replace(self, nodes=tuple(nodes))


@dataclass(frozen=True)
class Graph:
    """A model as a program: `main` first, then the layer bodies it repeats."""

    name: str
    functions: tuple[Function, ...]

    @property
    def main(self) -> Function:
        return self.functions[0]

    def function(self, name: str) -> Function:
        for function in self.functions:
            if function.name == name:
                return function
        raise KeyError(f"graph {self.name} has no function {name}")

    def weights(self) -> dict[str, Type]:
        """Every weight of the model by its full name, repeated layers spelled out."""
        table = {w.name[1:]: w.type for w in self.main.weights}
        for node in self.main.nodes:
            if node.op == "repeat":
                table.update(self._layer_weights(node))
        return table

    def _layer_weights(self, repeat: Node) -> Iterator[tuple[str, Type]]:
        for index, body in enumerate(layer_bodies(repeat)):
            for weight in self.function(body).weights:
                yield layer_weight(repeat, index, weight.name), weight.type


def layer_bodies(repeat: Node) -> list[str]:
    """The function that each layer of a `repeat` runs."""
    bodies, order = repeat.attr("bodies"), repeat.attr("order")
    assert isinstance(bodies, tuple)
    assert isinstance(order, tuple)
    return [str(bodies[int(kind)]) for kind in order]


def layer_weight(repeat: Node, index: int, name: str) -> str:
    """The full name of weight `@name` in layer `index`."""
    return f"{repeat.string('prefix')}.{index}.{name.removeprefix('@')}"


def walk(nodes: Iterable[Node]) -> Iterator[Node]:
    """Every node, a fused one before those inside it."""
    for node in nodes:
        yield node
        yield from walk(node.body)


def fuse(nodes: Iterable[Node], visible: Iterable[str]) -> Node:
    """One `fused` node around these, which shows the values named in `visible`."""
    body = tuple(leaf for node in nodes for leaf in node.leaves)
    shown = set(visible)
    results = tuple(v for node in body for v in node.results if v.name in shown)
    inside = {v.name for node in body for v in node.results}
    operands = dict.fromkeys(o for node in body for o in node.operands if o not in inside)
    return Node("fused", tuple(operands), results, (), body)


@dataclass
class Names:
    """Hands out names that a function does not use yet."""

    taken: set[str] = field(default_factory=set)

    def fresh(self, stem: str) -> str:
        name, count = stem, 0
        while name in self.taken:
            count += 1
            name = f"{stem}.{count}"
        self.taken.add(name)
        return name

"""Runs a graph in NumPy, node by node, whichever passes it has been through.

What a node computes is the `reference` of its row in `ir/ops.py`; here is only what goes where.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from tokenmill.ir.formats import Weight
from tokenmill.ir.graph import Function, Graph, Node, layer_bodies, layer_weight, walk
from tokenmill.ir.low_rank import FactorSlots
from tokenmill.ir.numerics import Cache
from tokenmill.ir.ops import OPS

FullName = Callable[[str], str]
"""From the name of a weight or of a cache in a function to its name in the whole model."""


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    """A graph, its weights, and a cache for each kv_write, both by full name.

    Activations are float32 arrays, rounded ones too. Handles are what the references take:
    `numerics.Place`, `sampling.Sampling` or None, and the caches themselves.
    """

    graph: Graph
    weights: Mapping[str, Weight | FactorSlots]
    caches: Mapping[str, Cache]

    def run(self, inputs: Mapping[str, object]) -> list[Any]:
        """The values that `main` returns; `inputs` are its parameters by name."""
        return self._call(self.graph.main, inputs, _main_name)

    def copy_block(self, source: int, target: int, *, is_windowed: bool) -> None:
        """Copy one block of keys and values in every layer of one kind."""
        for cache in self.caches.values():
            if cache.is_windowed == is_windowed:
                cache.keys[target] = cache.keys[source]
                cache.values[target] = cache.values[source]

    def _call(
        self, function: Function, inputs: Mapping[str, object], full_name: FullName
    ) -> list[Any]:
        known = dict(inputs)
        known.update((w.name, self.weights[full_name(w.name)]) for w in function.weights)
        for node in chain.from_iterable(n.leaves for n in function.nodes):
            operands = [known[name] for name in node.operands]
            if node.op == "repeat":
                known[node.result.name] = self._repeat(node, operands)
            elif node.op != "barrier":
                if node.op == "kv_write":
                    operands.append(self.caches[full_name(node.result.name)])
                known[node.result.name] = OPS[node.op].reference(*operands, **dict(node.attrs))
        return [known[name] for name in function.returns]

    def _repeat(self, repeat: Node, operands: list[object]) -> object:
        """Run the layers, each on the result of the one before."""
        x, *others = operands
        for index, name in enumerate(layer_bodies(repeat)):
            body = self.graph.function(name)
            names = [p.name for p in body.params]
            inputs = dict(zip(names, [x, *others], strict=True))
            [x] = self._call(body, inputs, partial(_layer_name, repeat, index))
        return x


def make_caches(
    graph: Graph, *, num_blocks: int, block_size: int, num_window_blocks: int | None = None
) -> dict[str, Cache]:
    """An empty cache for every kv_write of the model, by full name.

    Those with a window have `num_window_blocks`, if that is given.
    """
    caches = {}
    for function, full_name in _calls(graph):
        for node in walk(function.nodes):
            if node.op == "kv_write":
                heads, head_dim, *kept = map(int, node.result.type.shape)
                count = num_window_blocks if kept and num_window_blocks else num_blocks
                shape = (count, block_size, heads, head_dim)
                keys, values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
                caches[full_name(node.result.name)] = Cache(
                    keys=keys, values=values, is_windowed=bool(kept)
                )
    return caches


def _calls(graph: Graph) -> Iterator[tuple[Function, FullName]]:
    """Every function as often as a step runs it."""
    yield graph.main, _main_name
    for node in graph.main.nodes:
        if node.op == "repeat":
            for index, name in enumerate(layer_bodies(node)):
                yield graph.function(name), partial(_layer_name, node, index)


def _main_name(name: str) -> str:
    return name[1:]


def _layer_name(repeat: Node, index: int, name: str) -> str:
    return layer_weight(repeat, index, name[1:])

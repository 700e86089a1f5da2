"""Runs a graph in NumPy, node by node, whichever passes it has been through.

What a node computes is the `reference` of its row in `ir/ops.py`; here is only what gets where.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from tokenmill.ir.formats import Weight
from tokenmill.ir.graph import Function, Graph, Node, Type, layer_bodies, layer_weight, walk
from tokenmill.ir.numerics import Cache
from tokenmill.ir.ops import OPS


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    """A graph with its weights by full name, and its caches by the full name of their kv value.

    Activations are float32 arrays, rounded ones too; handles are whatever the references take:
    `numerics.Place`, `sampling.Sampling` or None, and the caches themselves.
    """

    graph: Graph
    weights: Mapping[str, Weight]
    caches: Mapping[str, Cache]

    def run(self, inputs: Mapping[str, object]) -> dict[str, object]:
        """The values that `main` returns, by name, for its parameters by name."""
        main = self.graph.main
        known = {w.name: self.weights[w.name[1:]] for w in main.weights} | dict(inputs)
        caches = {name: self.caches[name[1:]] for name in _kv_names(main) if name}
        self._run_nodes(main.nodes, known, caches)
        return {name: known[name] for name in main.returns}

    def _run_nodes(
        self, nodes: tuple[Node, ...], known: dict[str, object], caches: Mapping[str, Cache]
    ) -> None:
        for node in nodes:
            if node.op == "fused":
                self._run_nodes(node.body, known, caches)
            elif node.op == "repeat":
                known[node.result.name] = self._repeat(node, [known[o] for o in node.operands])
            elif node.op != "barrier":
                operands = [known[o] for o in node.operands]
                if node.op == "kv_write":
                    operands.append(caches[node.result.name])
                known[node.result.name] = OPS[node.op].reference(*operands, **dict(node.attrs))

    def _repeat(self, node: Node, operands: list[object]) -> object:
        """Run the layers; each takes the result of the one before as its first operand."""
        x, *others = operands
        for index, name in enumerate(layer_bodies(node)):
            body = self.graph.function(name)
            names = [v.name for v in body.params]
            known: dict[str, object] = dict(zip(names, [x, *others], strict=True))
            for weight in body.weights:
                known[weight.name] = self.weights[layer_weight(node, index, weight.name)]
            kv_names = {n: layer_weight(node, index, n) for n in _kv_names(body)}
            self._run_nodes(body.nodes, known, {n: self.caches[f] for n, f in kv_names.items()})
            x = known[body.returns[0]]
        return x

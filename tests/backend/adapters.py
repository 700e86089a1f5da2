"""Random adapters for random graphs: of several ranks, each for some of the linears."""

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from tests.backend.graphs import Case
from tokenmill.backends.base import CompiledModel
from tokenmill.ir.graph import Graph
from tokenmill.ir.low_rank import LowRank
from tokenmill.passes.add_adapters import AdapterRoom, adaptable, add_adapters

ADAPTER_SLOTS = 3
MAX_RANK = 19
Rng = np.random.Generator


def with_adapters(case: Case, rng: Rng) -> Case:
    """The case with room for adapters at some of its linears, and two adapters."""
    names = {w.name[1:] for f in case.graph.functions for w in f.weights}
    targets = {name for name in sorted(names) if rng.random() < 0.7}
    dtype = "lora" if case.activations == "f32" else "lora16"
    room = AdapterRoom(slots=ADAPTER_SLOTS, rank=MAX_RANK, dtype=dtype)
    adapters = tuple(random_adapter(case.graph, targets, rng) for _ in range(2))
    return replace(case, graph=add_adapters(case.graph, room, targets), adapters=adapters)


def random_adapter(graph: Graph, targets: Collection[str], rng: Rng) -> dict[str, LowRank]:
    """Changes about as large as the weights; some linears are left as they are."""
    found = {}
    for name, (n, k) in adaptable(graph, targets).items():
        rank = int(rng.integers(0, MAX_RANK + 1))
        if rank:
            down = rng.standard_normal((rank, k), np.float32) / np.float32(np.sqrt(k))
            up = rng.standard_normal((n, rank), np.float32) / np.float32(np.sqrt(rank))
            found[name] = LowRank(down_RK=down, up_NR=up)
    return found


def put_adapters(
    model: CompiledModel, case: Case, slots: "np.ndarray[tuple[int], np.dtype[np.int_]]"
) -> None:
    """Adapter i of the case into slot `slots[i]`."""
    for slot, changes in zip(slots.tolist(), case.adapters, strict=False):
        model.set_adapter(slot, changes)

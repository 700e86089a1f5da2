"""Shows a pass at work on a few lines of a graph, and proves that it keeps their meaning."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tests.backend.graphs import random_weights
from tests.file_check import check
from tokenmill.backends.reference.interpreter import Interpreter, make_caches
from tokenmill.ir.graph import Graph, Type
from tokenmill.ir.numerics import Place
from tokenmill.ir.text import parse, print_graph
from tokenmill.ir.verify import verify

Pass = Callable[[Graph], Graph]

HEAD = (
    "graph g {\n"
    "func main(%x: f32[T,64], %y: f32[T,64], %h: bf16[T,64], %place: place[T], %rows: i32[R]) "
    "weights(@norm: f32[64], @bias: f32[64], @q: q4[128,64], @k: q4[64,64], @v: q8[64,64], "
    "@o: q4[64,128], @gate: q4[96,64], @up: q8[96,64], @down: q4[64,96]) {\n"
)


def graph_of(lines: str) -> Graph:
    """The graph of a main function with these lines, over the values and weights of HEAD."""
    graph = parse(f"{HEAD}{lines}\n}}\n}}\n")
    verify(graph)
    return graph


def show(run: Pass, before: str, after: str) -> None:
    """`run` makes of `before` what the CHECK lines of `after` say, which computes the same."""
    graph = graph_of(before)
    changed = run(graph)
    check(print_graph(changed), after)
    assert_same(graph, changed)


def assert_same(graph: Graph, changed: Graph) -> None:
    """Both are legal, and to the last bit give the same results and leave the same caches."""
    verify(changed)
    assert parse(print_graph(changed)) == changed
    assert all(map(np.array_equal, run_graph(graph), run_graph(changed)))


def assert_unchanged(run: Pass, lines: str) -> None:
    graph = graph_of(lines)
    assert run(graph) == graph


def run_graph(graph: Graph, num_tokens: int = 5) -> list[npt.NDArray[np.generic]]:
    """What main returns for random inputs, and the caches that it leaves."""
    weights = random_weights(graph, ["q4"], seed=0)
    caches = make_caches(graph, num_blocks=2, block_size=4)
    interpreter = Interpreter(graph=graph, weights=weights, caches=caches)
    returned = interpreter.run({p.name: _input(p.type, num_tokens) for p in graph.main.params})
    stored = [plane for cache in caches.values() for plane in (cache.keys, cache.values)]
    return [*(v for v in returned if isinstance(v, np.ndarray)), *stored]


def _input(kind: Type, num_tokens: int) -> object:
    rng = np.random.default_rng(1)
    match kind.dtype:
        case "place":
            return Place(
                positions_T=np.arange(num_tokens, dtype=np.int32),
                sequences_T=np.zeros(num_tokens, np.int32),
                blocks_SB=np.array([[1, 0]], np.int32),
                block_size=4,
            )
        case "sampling":
            return None
        case "i32":
            return np.arange(num_tokens if kind.shape == ("T",) else 2, dtype=np.int32)
        case _:
            return rng.standard_normal((num_tokens, kind.shape[1]), np.float32)

"""add_adapters: room around linears, which the later passes take into their nodes."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.file_check import check
from tokenmill.ir.build import FunctionBuilder, finish_graph
from tokenmill.ir.graph import Graph, Value
from tokenmill.ir.low_rank import FACTORS
from tokenmill.ir.text import parse, print_graph
from tokenmill.ir.verify import verify
from tokenmill.passes.add_adapters import AdapterRoom, adaptable, add_adapters
from tokenmill.passes.pipeline import SPMD_PASSES, numeric_passes, run_passes

ROOM = AdapterRoom(slots=2, rank=4)
HIDDEN, INNER = 32, 64


def layer(f: FunctionBuilder, x: Value, place: Value) -> Value:
    """Attention without a norm, and an MLP."""
    q, k, v = (f.linear(x, f.weight(name, HIDDEN, HIDDEN)) for name in "qkv")
    q, k = (f.rope(t, place, head_dim=16, theta=1e4) for t in (q, k))
    kv = f.kv_write(k, v, place, head_dim=16)
    out = f.attention(q, kv, place, head_dim=16, scale=0.25)
    x = f.add(x, f.linear(out, f.weight("o", HIDDEN, HIDDEN)))
    gate, up = (f.linear(x, f.weight(name, INNER, HIDDEN)) for name in ("gate", "up"))
    y = f.mul(f.silu(gate), up)
    return f.add(x, f.linear(y, f.weight("down", HIDDEN, INNER)))


def make_graph(
    count: int = 2, layer: Callable[[FunctionBuilder, Value, Value], Value] = layer
) -> Graph:
    f = FunctionBuilder("main")
    tokens, place = f.param("tokens", "i32", "T"), f.param("place", "place", "T")
    rows = f.param("rows", "i32", "R")
    table = f.weight("embed", 100, HIDDEN)
    x = f.repeat(count, layer, f.embed(tokens, table), place)
    return finish_graph("g", f, f.linear(f.select_rows(x, rows), table))


def test_a_linear_is_put_between_two_operations() -> None:
    graph = add_adapters(make_graph(), ROOM, {"down", "embed"})
    verify(graph)
    assert parse(print_graph(graph)) == graph
    check(
        print_graph(graph),
        """
        CHECK: func main({{.*}}%adapters: adapters[T])
        CHECK: repeat(%embed, %place, %adapters)
        CHECK: linear(%rows.1, @embed)
        CHECK: func layer({{.*}}@down.lora_a: lora[2,4,64], @down.lora_b: lora[2,32,4])
        CHECK: linear(%x, @q)
        CHECK: %down.low = shrink(%mul, @down.lora_a, %adapters) : f32[T,4]
        CHECK-NEXT: %down.base = linear(%mul, @down)
        CHECK-NEXT: %down = expand(%down.base, %down.low, @down.lora_b, %adapters) : f32[T,32]
        CHECK: add(%add, %down)
        """.replace("%x,", "%embed,"),
    )


def test_what_can_be_adapted_is_told_by_full_name() -> None:
    found = adaptable(make_graph(), ("q", "down", "embed", "router"))
    assert found == {
        "layers.0.q": (HIDDEN, HIDDEN),
        "layers.0.down": (HIDDEN, INNER),
        "layers.1.q": (HIDDEN, HIDDEN),
        "layers.1.down": (HIDDEN, INNER),
    }


@pytest.mark.parametrize(
    ("activations", "dtype"), [("f32", "lora"), ("bf16", "lora16"), ("int8", "lora16")]
)
def test_nodes_stay_as_fused_as_they_are_without(activations: str, dtype: str) -> None:
    """A shrink reads what its linear reads, rounded for it; an expand is never a phase.

    Between the two, numbers are rounded as the factors are.
    """
    formats = dict.fromkeys(make_graph().weights(), "q8")
    passes = numeric_passes(formats=formats, activations=activations, cache="bf16")
    targets = {"q", "k", "v", "o", "gate", "up", "down"}
    plain, adapted = (
        run_passes(graph, (*passes, *SPMD_PASSES), lambda name, graph: verify(graph))
        for graph in (make_graph(), add_adapters(make_graph(), replace(ROOM, dtype=dtype), targets))
    )
    for before, after in zip(plain.functions, adapted.functions, strict=True):
        kinds = [[leaf.op for leaf in node.leaves] for node in after.nodes if node.op != "barrier"]
        left = [[op for op in ops if op != "expand"] for ops in kinds if ops[0] != "shrink"]
        assert left == [
            [leaf.op for leaf in node.leaves] for node in before.nodes if node.op != "barrier"
        ]
    shrinks = [n for n in adapted.functions[1].nodes if n.leaves[0].op == "shrink"]
    types = adapted.functions[1].values
    assert len(shrinks) == 7
    assert {types[n.operands[0]].dtype for n in shrinks} == {activations}
    assert {n.results[0].type.dtype for n in shrinks} == {FACTORS[dtype]}


def test_what_adapters_add_is_done_where_the_linear_is() -> None:
    """Also where a sum takes in only one of two linears."""

    def both(f: FunctionBuilder, x: Value, place: Value) -> Value:
        return f.add(*(f.linear(x, f.weight(name, HIDDEN, HIDDEN)) for name in "ab"))

    graph = make_graph(1, both)
    formats = dict.fromkeys(graph.weights(), "q8")
    passes = numeric_passes(formats=formats, activations="bf16", cache="bf16")
    graph = run_passes(add_adapters(graph, ROOM, {"a", "b"}), (*passes, *SPMD_PASSES))
    kinds = [[leaf.op for leaf in node.leaves] for node in graph.functions[1].nodes]
    assert ["linear", "expand"] in kinds
    assert ["linear", "expand", "add"] in kinds


def test_threads_are_level_around_what_adapters_compute() -> None:
    formats = dict.fromkeys(make_graph().weights(), "q8")
    passes = numeric_passes(formats=formats, activations="bf16", cache="bf16")
    graph = run_passes(add_adapters(make_graph(), ROOM, {"down"}), (*passes, *SPMD_PASSES))
    check(
        print_graph(graph),
        """
        CHECK: round(%mul)
        CHECK-NEXT: }
        CHECK-NEXT: barrier()
        CHECK-NEXT: %down.low.f32 = fused {
        CHECK-NEXT: %down.low = shrink(%mul.bf16
        CHECK-NEXT: round(%down.low)
        CHECK-NEXT: }
        CHECK-NEXT: barrier()
        CHECK-NEXT: %add.1 = fused {
        """,
    )

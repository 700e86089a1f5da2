"""round_activations: each linear's input in the type that its weight's format wants."""

import pytest

from tests.file_check import check
from tests.unit.passes.pass_text import graph_of
from tokenmill.ir.graph import Graph
from tokenmill.ir.text import parse, print_graph
from tokenmill.ir.verify import verify
from tokenmill.passes.round_activations import round_activations

LINEARS = """
%n = rmsnorm(%x, @norm) {eps=1e-05} : f32[T,64]
%a = linear(%n, @k) : f32[T,64]
%b = linear(%n, @v) : f32[T,64]
return %a, %b
"""
ATTENTION = """
%kv = kv_write(%x, %y, %place) {head_dim=32, to='f32'} : kv[2,32]
%a = attention(%x, %kv, %place) {head_dim=32, scale=0.5} : f32[T,64]
return %a
"""


def rounded(graph: Graph, activations: str, cache: str = "f32") -> Graph:
    changed = round_activations(graph, activations, cache)
    verify(changed)
    return changed


@pytest.mark.parametrize("activations", ["bf16", "int8", "f32"])
def test_an_input_is_rounded_once_right_before_its_first_linear(activations: str) -> None:
    check(
        print_graph(rounded(graph_of(LINEARS), activations)),
        f"""
        CHECK: %n = rmsnorm
        CHECK-NEXT: %n.{activations} = round(%n) {{to='{activations}'}}
        CHECK-NEXT: %a = linear(%n.{activations}, @k)
        CHECK-NEXT: %b = linear(%n.{activations}, @v)
        """,
    )


def with_format(dtype: str) -> Graph:
    """LINEARS, with @v in another format."""
    text = print_graph(graph_of(LINEARS))
    assert "@v: q8" in text
    return parse(text.replace("@v: q8", f"@v: {dtype}"))


def test_a_float32_weight_is_met_unrounded() -> None:
    check(
        print_graph(rounded(with_format("f32"), "bf16")),
        """
        CHECK: %n.bf16 = round(%n) {to='bf16'}
        CHECK-NEXT: %a = linear(%n.bf16, @k)
        CHECK-NEXT: %n.f32 = round(%n) {to='f32'}
        CHECK-NEXT: %b = linear(%n.f32, @v)
        """,
    )


def test_a_bf16_weight_is_met_in_bf16_where_int8_was_asked_for() -> None:
    check(
        print_graph(rounded(with_format("bf16"), "int8")),
        """
        CHECK: %a = linear(%n.int8, @k)
        CHECK: %n.bf16 = round(%n) {to='bf16'}
        CHECK-NEXT: %b = linear(%n.bf16, @v)
        """,
    )


def test_what_the_model_rounds_itself_stays() -> None:
    graph = graph_of("%a = linear(%h, @k) : f32[T,64]\nreturn %a")
    assert rounded(graph, "int8") == graph


def test_queries_are_rounded_for_a_bf16_cache() -> None:
    check(
        print_graph(rounded(graph_of(ATTENTION), "f32", "bf16")),
        """
        CHECK: %kv = kv_write(%x, %y, %place) {head_dim=32, to='bf16'}
        CHECK-NEXT: %x.bf16 = round(%x) {to='bf16'}
        CHECK-NEXT: %a = attention(%x.bf16, %kv, %place)
        """,
    )


@pytest.mark.parametrize("cache", ["f32", "int8"])
def test_queries_stay_for_other_caches(cache: str) -> None:
    check(
        print_graph(rounded(graph_of(ATTENTION), "bf16", cache)),
        f"""
        CHECK: %kv = kv_write(%x, %y, %place) {{head_dim=32, to='{cache}'}}
        CHECK-NEXT: %a = attention(%x, %kv, %place)
        """,
    )


def test_rounding_twice_is_rounding_once() -> None:
    once = rounded(graph_of(LINEARS), "bf16", "bf16")
    assert rounded(once, "bf16", "bf16") == once

"""clean_up: nothing is computed twice, and nothing in vain."""

from tests.file_check import check
from tests.unit.passes.pass_text import assert_same, assert_unchanged, graph_of, show
from tokenmill.ir.text import print_graph
from tokenmill.passes.clean_up import clean_up
from tokenmill.passes.fuse_norms import fuse_norms

KV = "%kv = kv_write(%x, %y, %place) {head_dim=32, to='f32'} : kv[2,32]\n"


def test_equal_nodes_become_one() -> None:
    show(
        clean_up,
        """
        %one = rmsnorm(%x, @norm) {eps=1e-05} : f32[T,64]
        %two = rmsnorm(%x, @norm) {eps=1e-05} : f32[T,64]
        %sum = add(%one, %two) : f32[T,64]
        return %sum
        """,
        """
        CHECK: %one = rmsnorm
        CHECK-NEXT: %sum = add(%one, %one)
        CHECK-NEXT: return %sum
        """,
    )


def test_what_becomes_equal_is_merged_too() -> None:
    show(
        clean_up,
        """
        %a = silu(%x) : f32[T,64]
        %b = silu(%x) : f32[T,64]
        %c = mul(%a, %y) : f32[T,64]
        %d = mul(%b, %y) : f32[T,64]
        return %c, %d
        """,
        """
        CHECK: %a = silu(%x)
        CHECK-NEXT: %c = mul(%a, %y)
        CHECK-NEXT: return %c, %c
        """,
    )


def test_what_differs_in_an_attribute_or_an_operand_stays() -> None:
    graph = graph_of(
        """
        %a = rmsnorm(%x, @norm) {eps=1e-05} : f32[T,64]
        %b = rmsnorm(%x, @norm) {eps=1e-06} : f32[T,64]
        %c = rmsnorm(%y, @norm) {eps=1e-05} : f32[T,64]
        %d = round(%a) {to='bf16'} : bf16[T,64]
        %e = round(%a) {to='int8'} : int8[T,64]
        return %a, %b, %c, %d, %e
        """
    )
    assert clean_up(graph).main.nodes == graph.main.nodes


def test_the_unused_goes_with_all_that_led_to_it() -> None:
    show(
        clean_up,
        """
        %n = rmsnorm(%x, @norm) {eps=1e-05} : f32[T,64]
        %s = silu(%n) : f32[T,64]
        %t = add(%x, %y) : f32[T,64]
        return %t
        """,
        """
        CHECK-NOT: @
        CHECK: %t = add(%x, %y)
        CHECK-NEXT: return %t
        """,
    )


def test_a_cache_is_written_though_nobody_reads_it() -> None:
    show(
        clean_up,
        f"%s = silu(%x) : f32[T,64]\n{KV.replace('%x', '%s')}return %y",
        """
        CHECK: %s = silu(%x)
        CHECK-NEXT: %kv = kv_write(%s
        """,
    )


def test_names_change_inside_fused_nodes_as_well() -> None:
    lines = """
    %a = silu(%x) : f32[T,64]
    %b = silu(%x) : f32[T,64]
    %n = rmsnorm(%b, @norm) {eps=1e-05} : f32[T,64]
    %n16 = round(%n) {to='bf16'} : bf16[T,64]
    return %a, %n16
    """
    graph = graph_of(lines)
    changed = clean_up(fuse_norms(graph))
    assert_same(graph, changed)
    check(print_graph(changed), "CHECK: %n16 = fused {\nCHECK-NEXT: rmsnorm(%a, @norm)")


def test_a_clean_graph_stays() -> None:
    cleaned = clean_up(graph_of("%s = silu(%x) : f32[T,64]\nreturn %s"))
    assert clean_up(cleaned) == cleaned
    assert_unchanged(lambda graph: graph, "return %x")

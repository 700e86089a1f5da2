"""fuse_gates: gate and up are computed side by side, and multiplied in registers."""

import pytest

from tests.unit.passes.pass_text import assert_unchanged, show
from tokenmill.passes.fuse_gates import fuse_gates

GATE = """
%gate = linear(%h, @gate) : f32[T,96]
%s = silu(%gate) : f32[T,96]
"""
UP = "%up = linear(%h, @up) : f32[T,96]\n"
PRODUCT = "%m = mul(%s, %up) : f32[T,96]\n"
ROUND = "%m16 = round(%m) {to='bf16'} : bf16[T,96]\n"


def test_a_gated_mlp_becomes_one_node() -> None:
    show(
        fuse_gates,
        GATE + UP + PRODUCT + ROUND + "return %m16",
        """
        CHECK: %m16 = fused {
        CHECK-NEXT: %gate = linear(%h, @gate) : f32[T,96]
        CHECK-NEXT: %s = silu(%gate) : f32[T,96]
        CHECK-NEXT: %up = linear(%h, @up) : f32[T,96]
        CHECK-NEXT: %m = mul(%s, %up) : f32[T,96]
        CHECK-NEXT: %m16 = round(%m) {to='bf16'} : bf16[T,96]
        CHECK-NEXT: }
        CHECK-NEXT: return %m16
        """,
    )


def test_without_a_rounding_the_product_is_shown() -> None:
    show(
        fuse_gates,
        GATE + UP + PRODUCT + ROUND + "return %m, %m16",
        """
        CHECK: %m = fused {
        CHECK: }
        CHECK-NEXT: %m16 = round(%m)
        """,
    )


def test_nodes_between_that_do_not_belong_stand_before_or_behind() -> None:
    show(
        fuse_gates,
        GATE + "%z = silu(%x) : f32[T,64]\n" + UP + PRODUCT + "return %m, %z",
        """
        CHECK: %z = silu(%x)
        CHECK-NEXT: %m = fused {
        """,
    )


OTHER_INPUT = "%y16 = round(%y) {to='bf16'} : bf16[T,64]\n%up = linear(%y16, @up) : f32[T,96]\n"


@pytest.mark.parametrize(
    "lines",
    [
        GATE + OTHER_INPUT + PRODUCT + "return %m",
        GATE + UP + "%m = mul(%up, %s) : f32[T,96]\nreturn %m",
        GATE + UP + "%m = add(%s, %up) : f32[T,96]\nreturn %m",
        GATE + UP + PRODUCT + "return %m, %gate",
        GATE + UP + PRODUCT + "return %m, %s",
        GATE + UP + PRODUCT + "%z = silu(%up) : f32[T,96]\nreturn %m, %z",
        GATE + "%m = mul(%s, %gate) : f32[T,96]\nreturn %m",
        GATE + "%m = mul(%s, %s) : f32[T,96]\nreturn %m",
        "%gate = linear(%h, @gate) : f32[T,96]\n"
        + UP
        + "%m = mul(%gate, %up) : f32[T,96]\nreturn %m",
    ],
    ids=[
        "two inputs",
        "the gate on the right",
        "a sum",
        "the gate is returned",
        "its silu is returned",
        "up is read by another",
        "x * silu(x)",
        "silu squared",
        "no silu",
    ],
)
def test_other_products_stay(lines: str) -> None:
    assert_unchanged(fuse_gates, lines)


def test_two_products_of_the_same_linears_stay() -> None:
    twice = PRODUCT + PRODUCT.replace("%m", "%m2")
    assert_unchanged(fuse_gates, GATE + UP + twice + "return %m, %m2")


EXPERTS = """
%l = linear(%h, @k) : f32[T,64]
%routes = route(%l) {top_k=2, renormalize=True} : routes[T,2,64]
%groups = group(%routes) : groups[T,2,64]
%d = dispatch(%x, %groups) : f32[T,2,64]
%gate = expert_linear(%d, @q, %groups) : f32[T,2,2]
%g = gelu(%gate) : f32[T,2,2]
"""


def test_linears_of_experts_are_merged_as_others_are() -> None:
    show(
        fuse_gates,
        EXPERTS
        + """%up = expert_linear(%d, @q, %groups) : f32[T,2,2]
        %m = mul(%g, %up) : f32[T,2,2]
        return %m""",
        """
        CHECK: %m = fused {
        CHECK-NEXT: %gate = expert_linear(%d, @q, %groups)
        CHECK-NEXT: %g = gelu(%gate)
        CHECK-NEXT: %up = expert_linear(%d, @q, %groups)
        CHECK-NEXT: %m = mul(%g, %up)
        CHECK-NEXT: }
        """,
    )


def test_experts_of_other_groups_stay_apart() -> None:
    assert_unchanged(
        fuse_gates,
        EXPERTS
        + """%again = group(%routes) : groups[T,2,64]
        %up = expert_linear(%d, @q, %again) : f32[T,2,2]
        %m = mul(%g, %up) : f32[T,2,2]
        return %m""",
    )


BENT = """
%gate = linear(%h, @gate) : f32[T,96]
%s = gelu_erf(%gate) : f32[T,96]
"""


def test_without_a_gate_the_linear_is_bent_in_registers() -> None:
    show(
        fuse_gates,
        BENT + "%s16 = round(%s) {to='bf16'} : bf16[T,96]\nreturn %s16",
        """
        CHECK: %s16 = fused {
        CHECK-NEXT: %gate = linear(%h, @gate) : f32[T,96]
        CHECK-NEXT: %s = gelu_erf(%gate) : f32[T,96]
        CHECK-NEXT: %s16 = round(%s) {to='bf16'} : bf16[T,96]
        CHECK-NEXT: }
        CHECK-NEXT: return %s16
        """,
    )


def test_a_linear_that_is_read_before_it_is_bent_stays() -> None:
    assert_unchanged(fuse_gates, BENT + "return %s, %gate")

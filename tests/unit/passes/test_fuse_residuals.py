"""fuse_residuals: a residual is added before the linear's result is stored."""

import pytest

from tests.unit.passes.pass_text import assert_unchanged, show
from tokenmill.passes.fuse_residuals import fuse_residuals

LINEAR = "%k = linear(%h, @k) : f32[T,64]\n"


@pytest.mark.parametrize("operands", ["%x, %k", "%k, %x"])
def test_a_linear_takes_in_the_sum_whichever_side_it_is_on(operands: str) -> None:
    show(
        fuse_residuals,
        LINEAR + f"%sum = add({operands}) : f32[T,64]\nreturn %sum",
        f"""
        CHECK: %sum = fused {{
        CHECK-NEXT: %k = linear(%h, @k)
        CHECK-NEXT: %sum = add({operands})
        CHECK-NEXT: }}
        """,
    )


def test_of_two_linears_the_second_takes_the_sum() -> None:
    show(
        fuse_residuals,
        LINEAR + "%v = linear(%h, @v) : f32[T,64]\n%sum = add(%k, %v) : f32[T,64]\nreturn %sum",
        """
        CHECK: %k = linear(%h, @k)
        CHECK-NEXT: %sum = fused {
        CHECK-NEXT: %v = linear(%h, @v)
        CHECK-NEXT: %sum = add(%k, %v)
        """,
    )


def test_a_chain_of_sums_gives_each_linear_its_own() -> None:
    show(
        fuse_residuals,
        LINEAR
        + """%v = linear(%h, @v) : f32[T,64]
        %one = add(%x, %k) : f32[T,64]
        %two = add(%one, %v) : f32[T,64]
        return %two""",
        """
        CHECK: %one = fused {
        CHECK-NEXT: linear(%h, @k)
        CHECK-NEXT: add(%x, %k)
        CHECK: %two = fused {
        CHECK-NEXT: linear(%h, @v)
        CHECK-NEXT: add(%one, %v)
        """,
    )


@pytest.mark.parametrize(
    "lines",
    [
        "%sum = add(%k, %k) : f32[T,64]\nreturn %sum",
        "%sum = add(%x, %k) : f32[T,64]\nreturn %sum, %k",
        "%s = silu(%k) : f32[T,64]\n%sum = add(%x, %k) : f32[T,64]\nreturn %sum, %s",
        "%sum = mul(%x, %k) : f32[T,64]\nreturn %sum",
        "%s = silu(%k) : f32[T,64]\n%sum = add(%x, %s) : f32[T,64]\nreturn %sum",
    ],
    ids=["doubled", "returned", "read by another", "a product", "not of the linear itself"],
)
def test_other_linears_stay(lines: str) -> None:
    assert_unchanged(fuse_residuals, LINEAR + lines)


def test_scales_and_caps_between_a_linear_and_a_sum_go_with_them() -> None:
    show(
        fuse_residuals,
        LINEAR
        + """%small = scale(%k) {by=0.25} : f32[T,64]
        %sum = add(%x, %small) : f32[T,64]
        return %sum""",
        """
        CHECK: %sum = fused {
        CHECK-NEXT: linear(%h, @k)
        CHECK-NEXT: scale(%k) {by=0.25}
        CHECK-NEXT: add(%x, %small)
        """,
    )


def test_a_cap_goes_with_its_linear_where_there_is_no_sum() -> None:
    show(
        fuse_residuals,
        LINEAR + "%capped = softcap(%k) {cap=30.0} : f32[T,64]\nreturn %capped",
        """
        CHECK: %capped = fused {
        CHECK-NEXT: linear(%h, @k)
        CHECK-NEXT: softcap(%k) {cap=30.0}
        """,
    )

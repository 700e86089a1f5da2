"""fuse_norms: a norm and the rounding of its result are one walk over a row."""

from tests.unit.passes.pass_text import assert_unchanged, show
from tokenmill.passes.fuse_norms import fuse_norms

NORM = "%n = rmsnorm(%x, @norm) {eps=1e-05} : f32[T,64]\n"
ROUND = "%n16 = round(%n) {to='bf16'} : bf16[T,64]\n"


def test_a_norm_takes_in_its_rounding() -> None:
    show(
        fuse_norms,
        NORM + ROUND + "return %n16",
        """
        CHECK: %n16 = fused {
        CHECK-NEXT: %n = rmsnorm(%x, @norm) {eps=1e-05} : f32[T,64]
        CHECK-NEXT: %n16 = round(%n) {to='bf16'} : bf16[T,64]
        CHECK-NEXT: }
        CHECK-NEXT: return %n16
        """,
    )


def test_what_stands_between_moves_in_front() -> None:
    show(
        fuse_norms,
        NORM + "%s = silu(%x) : f32[T,64]\n" + ROUND + "return %n16, %s",
        """
        CHECK: %s = silu
        CHECK-NEXT: fused {
        """,
    )


def test_a_norm_that_others_read_stays() -> None:
    assert_unchanged(fuse_norms, NORM + ROUND + "%s = silu(%n) : f32[T,64]\nreturn %n16, %s")


def test_a_norm_that_is_returned_stays() -> None:
    assert_unchanged(fuse_norms, NORM + ROUND + "return %n, %n16")


def test_a_norm_that_is_rounded_in_two_ways_stays() -> None:
    assert_unchanged(
        fuse_norms, NORM + ROUND + "%n32 = round(%n) {to='f32'} : f32[T,64]\nreturn %n16, %n32"
    )


def test_a_norm_that_is_not_rounded_stays() -> None:
    assert_unchanged(fuse_norms, NORM + "return %n")


LAYER_NORM = "%n = layer_norm(%x, @norm, @bias) {eps=1e-05} : f32[T,64]\n"


def test_a_layer_norm_that_is_added_later_takes_in_its_rounding_and_stays_visible() -> None:
    show(
        fuse_norms,
        LAYER_NORM + ROUND + "%s = silu(%n) : f32[T,64]\nreturn %n16, %s",
        """
        CHECK: %n, %n16 = fused {
        CHECK-NEXT: %n = layer_norm(%x, @norm, @bias) {eps=1e-05} : f32[T,64]
        CHECK-NEXT: %n16 = round(%n) {to='bf16'} : bf16[T,64]
        CHECK-NEXT: }
        CHECK-NEXT: %s = silu(%n)
        """,
    )


def test_a_layer_norm_that_is_read_before_it_is_rounded_stays() -> None:
    assert_unchanged(
        fuse_norms, LAYER_NORM + "%s = silu(%n) : f32[T,64]\n" + ROUND + "return %n16, %s"
    )

"""fuse_qkv: three projections of one input, turned and stored while they are in registers."""

import pytest

from tests.unit.passes.pass_text import assert_unchanged, show
from tokenmill.passes.fuse_qkv import fuse_qkv

Q = "%q = linear(%h, @q) : f32[T,128]\n"
K = "%k = linear(%h, @k) : f32[T,64]\n"
V = "%v = linear(%h, @v, @bias) : f32[T,64]\n"
TURN_Q = "%qr = rope(%q, %place) {head_dim=32, theta=10000.0} : f32[T,128]\n"
TURN_K = "%kr = rope(%k, %place) {head_dim=32, theta=10000.0} : f32[T,64]\n"
WRITE = "%kv = kv_write(%kr, %v, %place) {head_dim=32, to='bf16'} : kv[2,32]\n"
ROUND = "%q16 = round(%qr) {to='bf16'} : bf16[T,128]\n"
READ = "%a = attention(%q16, %kv, %place) {head_dim=32, scale=0.5} : f32[T,128]\n"
ATTENTION = Q + K + V + TURN_Q + TURN_K + WRITE + ROUND + READ


def test_all_up_to_the_cache_becomes_one_node() -> None:
    show(
        fuse_qkv,
        ATTENTION + "return %a",
        """
        CHECK: %kv, %q16 = fused {
        CHECK-NEXT: %q = linear(%h, @q) : f32[T,128]
        CHECK-NEXT: %k = linear(%h, @k) : f32[T,64]
        CHECK-NEXT: %v = linear(%h, @v, @bias) : f32[T,64]
        CHECK-NEXT: %qr = rope(%q, %place)
        CHECK-NEXT: %kr = rope(%k, %place)
        CHECK-NEXT: %kv = kv_write(%kr, %v, %place)
        CHECK-NEXT: %q16 = round(%qr) {to='bf16'}
        CHECK-NEXT: }
        CHECK-NEXT: %a = attention(%q16, %kv, %place)
        CHECK-NEXT: return %a
        """,
    )


def test_neither_turning_nor_rounding_is_needed() -> None:
    show(
        fuse_qkv,
        Q + K + V + WRITE.replace("%kr", "%k") + READ.replace("%q16", "%q") + "return %a",
        """
        CHECK: %q, %kv = fused {
        CHECK-NEXT: linear(%h, @q)
        CHECK-NEXT: linear(%h, @k)
        CHECK-NEXT: linear(%h, @v, @bias)
        CHECK-NEXT: kv_write(%k, %v, %place)
        CHECK-NEXT: }
        """,
    )


def test_what_stands_between_moves_in_front() -> None:
    show(
        fuse_qkv,
        ATTENTION.replace(V, "%z = silu(%x) : f32[T,64]\n" + V) + "return %a, %z",
        """
        CHECK: %z = silu(%x)
        CHECK-NEXT: fused {
        """,
    )


def of_another_input(line: str) -> str:
    """A linear line, on its own rounding of %y."""
    return "%y16 = round(%y) {to='bf16'} : bf16[T,64]\n" + line.replace("%h", "%y16")


@pytest.mark.parametrize(
    "lines",
    [
        ATTENTION.replace(K, of_another_input(K)) + "return %a",
        ATTENTION.replace(Q, of_another_input(Q)) + "return %a",
        ATTENTION + "return %a, %v",
        ATTENTION + "return %a, %qr",
        ATTENTION + "return %a, %kv",
        ATTENTION + "%z = silu(%k) : f32[T,64]\nreturn %a, %z",
        ATTENTION + READ.replace("%a", "%b") + "return %a, %b",
        ATTENTION.replace("(%kr, %v", "(%kr, %kr").replace(V, "") + "return %a",
        ATTENTION.replace(WRITE, TURN_K.replace("%k", "%v") + WRITE.replace("%v", "%vr"))
        + "return %a",
        ATTENTION.replace(TURN_K, TURN_K.replace("head_dim=32", "head_dim=64")) + "return %a",
        WRITE.replace("(%kr, %v", "(%x, %y")
        + Q
        + READ.replace("%q16", "%q")
        + "return %a",
    ],
    ids=[
        "keys of another input",
        "queries of another input",
        "values are returned",
        "queries are returned before they are rounded",
        "the cache is returned",
        "keys are read by another",
        "two attentions read the cache",
        "keys are the values",
        "values are turned",
        "keys are turned in wider heads",
        "keys and values are no linears",
    ],
)  # fmt: skip
def test_other_attentions_stay(lines: str) -> None:
    assert_unchanged(fuse_qkv, lines)

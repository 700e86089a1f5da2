"""fuse_attention: a head's result is rounded as soon as it is finished."""

from tests.unit.passes.pass_text import assert_unchanged, show
from tokenmill.passes.fuse_attention import fuse_attention


def attention(head_dim: int, heads: int) -> str:
    return f"""
    %kv = kv_write(%x, %y, %place) {{head_dim={head_dim}, to='f32'}} : kv[{heads},{head_dim}]
    %a = attention(%x, %kv, %place) {{head_dim={head_dim}, scale=0.25}} : f32[T,64]
    """


ROUND = "%a8 = round(%a) {to='int8'} : int8[T,64]\n"


def test_attention_takes_in_its_rounding() -> None:
    show(
        fuse_attention,
        attention(32, 2) + ROUND + "return %a8",
        """
        CHECK: %kv = kv_write
        CHECK-NEXT: %a8 = fused {
        CHECK-NEXT: %a = attention(%x, %kv, %place)
        CHECK-NEXT: %a8 = round(%a)
        CHECK-NEXT: }
        """,
    )


def test_a_rounding_group_may_not_straddle_two_heads() -> None:
    assert_unchanged(fuse_attention, attention(16, 4) + ROUND + "return %a8")


def test_a_result_that_others_read_stays() -> None:
    lines = attention(32, 2) + ROUND
    assert_unchanged(fuse_attention, lines + "%s = silu(%a) : f32[T,64]\nreturn %a8, %s")
    assert_unchanged(fuse_attention, lines + "return %a, %a8")

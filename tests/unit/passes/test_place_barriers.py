"""place_barriers: a barrier where a thread reads what another wrote, and no other."""

from tests.unit.passes.pass_text import show
from tokenmill.passes.place_barriers import place_barriers


def test_threads_that_walk_the_same_rows_need_no_barrier() -> None:
    show(
        place_barriers,
        """
        %s = silu(%x) : f32[T,64]
        %n = rmsnorm(%s, @norm) {eps=1e-05} : f32[T,64]
        %n16 = round(%n) {to='bf16'} : bf16[T,64]
        return %n16
        """,
        """
        CHECK: silu
        CHECK-NOT: barrier
        CHECK: return
        """,
    )


def test_a_linear_waits_for_its_input_and_its_readers_wait_for_it() -> None:
    show(
        place_barriers,
        """
        %n16 = round(%x) {to='bf16'} : bf16[T,64]
        %a = linear(%n16, @k) : f32[T,64]
        %b = linear(%n16, @v) : f32[T,64]
        %sum = add(%a, %b) : f32[T,64]
        return %sum
        """,
        """
        CHECK: round
        CHECK-NEXT: barrier()
        CHECK-NEXT: linear(%n16, @k)
        CHECK-NEXT: linear(%n16, @v)
        CHECK-NEXT: barrier()
        CHECK-NEXT: add
        CHECK-NEXT: return
        """,
    )


def test_a_chosen_row_may_be_anothers_token() -> None:
    show(
        place_barriers,
        """
        %s = silu(%x) : f32[T,64]
        %r = select_rows(%s, %rows) : f32[R,64]
        %n = rmsnorm(%r, @norm) {eps=1e-05} : f32[R,64]
        return %n
        """,
        """
        CHECK: silu
        CHECK-NEXT: barrier()
        CHECK-NEXT: select_rows
        CHECK-NEXT: rmsnorm
        """,
    )


def test_attention_waits_for_the_cache() -> None:
    show(
        place_barriers,
        """
        %kv = kv_write(%x, %y, %place) {head_dim=32, to='f32'} : kv[2,32]
        %a = attention(%x, %kv, %place) {head_dim=32, scale=0.5} : f32[T,64]
        return %a
        """,
        """
        CHECK: kv_write
        CHECK-NEXT: barrier()
        CHECK-NEXT: attention
        """,
    )

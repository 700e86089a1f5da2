"""The work of a phase: nothing inside it moves bytes, nothing outside is read twice."""

import pytest

from tokenmill.ir.graph import Node, Type, Value, fuse
from tokenmill.ir.phase_work import phase_work

SIZES = {"T": 6, "R": 2, "S": 2, "C": 21, "P": 9}
TYPES = {
    "%x": Type.parse("bf16[T,64]"),
    "@gate": Type.parse("bf16[96,64]"),
    "@up": Type.parse("bf16[96,64]"),
    **{name: Type.parse("f32[T,96]") for name in ("%gate", "%up", "%mul")},
}


def node(op: str, result: str, *operands: str) -> Node:
    return Node(op, operands, (Value(result, TYPES[result]),))


GATE = node("linear", "%gate", "%x", "@gate")
UP = node("linear", "%up", "%x", "@up")
MUL = node("mul", "%mul", "%gate", "%up")
ROW, WEIGHT, OUT = 6 * 64 * 2, 96 * 64 * 2, 6 * 96 * 4


def test_a_plain_node_reads_its_operands_and_writes_its_result() -> None:
    work = phase_work(GATE, TYPES, SIZES, cache="bf16")
    assert (work.flops, work.size_bytes) == (2 * 6 * 64 * 96, ROW + WEIGHT + OUT)


@pytest.mark.parametrize(
    ("visible", "results"), [(("%mul",), 1), (("%mul", "%gate"), 2), (("%mul", "%gate", "%up"), 3)]
)
def test_a_fused_node_moves_what_crosses_its_border(visible: tuple[str, ...], results: int) -> None:
    work = phase_work(fuse([GATE, UP, MUL], visible), TYPES, SIZES, cache="bf16")
    assert work.flops == 2 * 2 * 6 * 64 * 96 + 6 * 96
    assert work.size_bytes == ROW + 2 * WEIGHT + results * OUT
    assert work.intensity == work.flops / work.size_bytes

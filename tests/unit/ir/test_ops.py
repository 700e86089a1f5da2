"""The table of operations: what types it takes, what it refuses, and what work it counts."""

import inspect

import pytest

from tokenmill.ir.graph import Attr, Node, Type, Value
from tokenmill.ir.ops import OPS, elements, infer
from tokenmill.ir.type_rules import TypeMismatchError
from tokenmill.ir.work import flops, moved_bytes, size_bytes

SIZES = {"T": 6, "R": 2, "S": 2, "C": 21, "P": 9}


def make(op: str, *operands: str, **attrs: Attr) -> tuple[Node, list[Type]]:
    """A node whose operands are written as types, weights with an @ in front."""
    names = tuple(f"{'@' if o.startswith('@') else '%'}x{i}" for i, o in enumerate(operands))
    types = [Type.parse(o.removeprefix("@")) for o in operands]
    draft = Node(op, names, (), tuple(attrs.items()))
    return draft, types


def finish(op: str, *operands: str, **attrs: Attr) -> tuple[Node, list[Type]]:
    draft, types = make(op, *operands, **attrs)
    result = Value("%y", infer(draft, types))
    return Node(op, draft.operands, (result,), draft.attrs), types


@pytest.mark.parametrize(
    ("op", "operands", "attrs", "result"),
    [
        ("embed", ("i32[T]", "@q8[512,64]"), {}, "f32[T,64]"),
        ("rmsnorm", ("f32[R,64]", "@f32[64]"), {"eps": 1e-5}, "f32[R,64]"),
        ("layer_norm", ("f32[E,64]", "@f32[64]", "@f32[64]"), {"eps": 1e-5}, "f32[E,64]"),
        ("embed_place", ("place[T]", "@q8[512,64]"), {"by": "position", "offset": 2}, "f32[T,64]"),
        ("gelu_erf", ("f32[T,96]",), {}, "f32[T,96]"),
        ("round", ("f32[T,64]",), {"to": "int8"}, "int8[T,64]"),
        ("linear", ("bf16[T,64]", "@w[96,64]"), {}, "f32[T,96]"),
        ("linear", ("int8[T,64]", "@q4[96,64]", "@f32[96]"), {}, "f32[T,96]"),
        ("rope", ("f32[T,64]", "place[T]"), {"head_dim": 32, "theta": 10000}, "f32[T,64]"),
        (
            "kv_write",
            ("f32[T,64]", "f32[T,64]", "place[T]"),
            {"head_dim": 32, "to": "bf16"},
            "kv[2,32]",
        ),
        (
            "attention",
            ("bf16[T,128]", "kv[2,32]", "place[T]"),
            {"head_dim": 32, "scale": 0.2},
            "f32[T,128]",
        ),
        ("silu", ("f32[T,96]",), {}, "f32[T,96]"),
        ("gelu", ("f32[T,96]",), {}, "f32[T,96]"),
        ("scale", ("f32[T,96]",), {"by": 0.5}, "f32[T,96]"),
        ("route", ("f32[T,8]",), {"top_k": 2, "renormalize": True}, "routes[T,2,8]"),
        ("group", ("routes[T,2,8]",), {}, "groups[T,2,8]"),
        ("dispatch", ("f32[T,64]", "groups[T,2,8]"), {}, "f32[T,2,64]"),
        ("expert_linear", ("bf16[T,2,64]", "@q4[256,64]", "groups[T,2,8]"), {}, "f32[T,2,32]"),
        ("combine", ("f32[T,2,64]", "routes[T,2,8]", "groups[T,2,8]"), {}, "f32[T,64]"),
        ("shrink", ("int8[T,64]", "@lora[3,8,64]", "adapters[T]"), {}, "f32[T,8]"),
        ("expand", ("f32[T,96]", "f32[T,8]", "@lora16[3,96,8]", "adapters[T]"), {}, "f32[T,96]"),
        ("softcap", ("f32[T,96]",), {"cap": 30.0}, "f32[T,96]"),
        ("head_norm", ("f32[T,64]", "@f32[32]"), {"head_dim": 32, "eps": 1e-5}, "f32[T,64]"),
        (
            "rope",
            ("f32[T,64]", "place[T]"),
            {"head_dim": 4, "frequencies": (1.0, 0.5), "magnitude": 1.5},
            "f32[T,64]",
        ),
        ("add", ("f32[T,96]", "f32[T,96]"), {}, "f32[T,96]"),
        ("mul", ("f32[T,96]", "f32[T,96]"), {}, "f32[T,96]"),
        ("select_rows", ("f32[T,64]", "i32[R]"), {}, "f32[R,64]"),
        ("sample", ("f32[R,512]", "sampling[R]"), {}, "i32[R]"),
    ],
)
def test_result_types(
    op: str, operands: tuple[str, ...], attrs: dict[str, Attr], result: str
) -> None:
    assert str(infer(*make(op, *operands, **attrs))) == result


HEAD_NORM: dict[str, Attr] = {"head_dim": 32, "eps": 1e-5}
ROPE = {"head_dim": 32, "theta": 1e4}
KV = {"head_dim": 32, "to": "f32"}
ATTENTION = {"head_dim": 32, "scale": 0.2}


@pytest.mark.parametrize(
    ("op", "operands", "attrs", "message"),
    [
        ("tanh", ("f32[T,64]",), {}, "there is no operation 'tanh'"),
        ("silu", (), {}, "silu takes x; given 0 operands"),
        ("add", ("f32[T,4]",), {}, "add takes a, b; given 1 operands"),
        ("linear", ("f32[T,4]", "@w[4,4]", "@f32[4]", "@f32[4]"), {}, "given 4 operands"),
        ("silu", ("f32[T,4]",), {"to": "f32"}, "silu takes attributes none; given {'to': 'f32'}"),
        ("round", ("f32[T,4]",), {}, "round takes attributes to: str; given {}"),
        ("rmsnorm", ("f32[T,4]", "@f32[4]"), {"eps": "small"}, "attributes eps: float"),
        ("rope", ("f32[T,64]", "place[T]"), {"head_dim": 32.0, "theta": 1e4}, "head_dim: int"),
        ("rope", ("f32[T,64]", "place[T]"), {"head_dim": True, "theta": 1e4}, "head_dim: int"),
        # weights and values do not stand in for each other
        ("linear", ("f32[T,4]", "f32[4,4]"), {}, "%x1 cannot be the weight"),
        ("linear", ("@f32[8,4]", "@f32[4,4]"), {}, "@x0 cannot be the x"),
        ("linear", ("f32[T,4]", "@w[4,4]", "f32[4]"), {}, "%x2 cannot be the bias?"),
        ("embed", ("i32[T]", "f32[T,4]"), {}, "%x1 cannot be the table"),
        # shapes and types
        ("embed", ("f32[T]", "@w[8,4]"), {}, "the tokens must be i32[n], is f32[T]"),
        ("embed", ("i32", "@w[8,4]"), {}, "the tokens must be i32[n], is i32"),
        ("embed", ("i32[T]", "@w[8]"), {}, "the table must have two dimensions"),
        ("rmsnorm", ("bf16[T,4]", "@f32[4]"), {"eps": 1e-5}, "x must be f32"),
        ("rmsnorm", ("f32[T,4]", "@f32[8]"), {"eps": 1e-5}, "the weight must be f32[4]"),
        ("rmsnorm", ("f32[T,4]", "@q8[4]"), {"eps": 1e-5}, "the weight must be f32[4]"),
        ("round", ("bf16[T,4]",), {"to": "int8"}, "x must be f32, is bf16[T,4]"),
        ("round", ("f32[T,4]",), {"to": "q4"}, "cannot round to q4"),
        ("linear", ("f32[T,4]", "@w[4,8]"), {}, "the weight takes 8 inputs, x is f32[T,4]"),
        ("linear", ("i32[T,4]", "@w[4,4]"), {}, "x must be an activation"),
        ("linear", ("f32[4]", "@w[4,4]"), {}, "x must have two dimensions"),
        ("linear", ("f32[T,4]", "@w[8,4]", "@f32[4]"), {}, "the bias must be f32[8]"),
        ("rope", ("f32[T,48]", "place[T]"), ROPE, "f32[T,48] is no multiple of head_dim 32"),
        ("rope", ("f32[T,48]", "place[T]"), ROPE | {"head_dim": 0}, "no multiple of head_dim 0"),
        ("rope", ("f32[T,15]", "place[T]"), ROPE | {"head_dim": 5}, "head_dim must be even"),
        ("rope", ("f32[R,64]", "place[T]"), ROPE, "the place must be place[R], is place[T]"),
        ("rope", ("f32[T,64]", "place[T]"), {"head_dim": 32}, "rope takes theta or frequencies"),
        (
            "rope",
            ("f32[T,64]", "place[T]"),
            {"head_dim": 8, "frequencies": (1.0,)},
            "rope takes 4 frequencies",
        ),
        ("route", ("f32[T,2]",), {"top_k": 3, "renormalize": True}, "cannot choose 3 of 2 experts"),
        ("dispatch", ("f32[R,64]", "groups[T,2,8]"), {}, "groups[T,2,8] do not group f32[R,64]"),
        (
            "expert_linear",
            ("f32[T,2,64]", "@w[250,64]", "groups[T,2,8]"),
            {},
            "w[250,64] does not divide by 8 experts",
        ),
        ("expert_linear", ("f32[T,64]", "@w[8,64]", "groups[T,2,8]"), {}, "a row a pair of groups"),
        (
            "combine",
            ("f32[T,2,64]", "routes[T,2,4]", "groups[T,2,8]"),
            {},
            "routes[T,2,4] are not those of groups[T,2,8]",
        ),
        ("shrink", ("f32[T,64]", "@w[8,64]", "adapters[T]"), {}, "the weight must be lora[S,N,K]"),
        ("shrink", ("f32[T,64]", "@lora[3,8,32]", "adapters[T]"), {}, "takes 32 inputs, x is"),
        ("shrink", ("f32[T,64]", "@lora[3,8,64]", "adapters[R]"), {}, "are not those of f32[T,64]"),
        (
            "expand",
            ("f32[T,96]", "f32[T,8]", "@lora[3,90,8]", "adapters[T]"),
            {},
            "y must be f32[T,90], is f32[T,96]",
        ),
        (
            "expand",
            ("f32[T,96]", "f32[T,4]", "@lora[3,96,8]", "adapters[T]"),
            {},
            "f32[T,4] does not fit lora[3,96,8] and f32[T,96]",
        ),
        ("head_norm", ("f32[T,64]", "@f32[64]"), HEAD_NORM, "the weight must be f32[32]"),
        ("head_norm", ("f32[T,40]", "@f32[32]"), HEAD_NORM, "no multiple of head_dim 32"),
        ("rope", ("f32[T,64]", "i32[T]"), ROPE, "the place must be place[T], is i32[T]"),
        ("kv_write", ("f32[T,64]", "f32[T,32]", "place[T]"), KV, "k and v must be alike"),
        ("kv_write", ("bf16[T,64]", "bf16[T,64]", "place[T]"), KV, "k and v must be alike"),
        ("kv_write", ("f32[T,64]",) * 2 + ("place[T]",), KV | {"to": "q4"}, "no cache of q4"),
        ("attention", ("f32[T,64]", "f32[T,64]", "place[T]"), ATTENTION, "kv must be a cache"),
        ("attention", ("int8[T,64]", "kv[2,32]", "place[T]"), ATTENTION, "q must be f32 or bf16"),
        ("attention", ("f32[T,64]", "kv[4,16]", "place[T]"), ATTENTION, "head_dim differs"),
        ("attention", ("f32[T,96]", "kv[2,32]", "place[T]"), ATTENTION, "3 heads do not share 2"),
        (
            "kv_write",
            ("f32[T,64]",) * 2 + ("place[T]",),
            KV | {"window": 0},
            "must hold a position",
        ),
        (
            "attention",
            ("f32[T,64]", "kv[2,32,16]", "place[T]"),
            ATTENTION,
            "a window of all over kv[2,32,16]",
        ),
        (
            "attention",
            ("f32[T,64]", "kv[2,32,16]", "place[T]"),
            ATTENTION | {"window": 4, "causal": False},
            "kv[2,32,16] has no positions behind a window",
        ),
        (
            "layer_norm",
            ("f32[T,4]", "@f32[4]", "@f32[8]"),
            {"eps": 1e-5},
            "the bias must be f32[4]",
        ),
        ("embed_place", ("i32[T]", "@w[8,4]"), {"by": "position"}, "the place must be place[n]"),
        ("embed_place", ("place[T]", "@w[8,4]"), {"by": "colour"}, "nothing lies by colour"),
        ("add", ("f32[T,4]", "f32[R,4]"), {}, "operands differ: f32[T,4] and f32[R,4]"),
        ("mul", ("bf16[T,4]", "bf16[T,4]"), {}, "x must be f32"),
        ("select_rows", ("f32[T,4]", "f32[R]"), {}, "the rows must be i32[n]"),
        ("sample", ("f32[R,8]", "sampling[T]"), {}, "sampling is sampling[T] for R rows"),
    ],
)
def test_what_an_operation_refuses(
    op: str, operands: tuple[str, ...], attrs: dict[str, Attr], message: str
) -> None:
    with pytest.raises(TypeMismatchError) as error:
        infer(*make(op, *operands, **attrs))
    assert message in str(error.value)


def test_every_reference_takes_the_attributes_of_its_row() -> None:
    for op in OPS.values():
        parameters = inspect.signature(op.reference).parameters.values()
        named = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        assert named == {key.removesuffix("?") for key in op.attrs}, op.name


def test_sizes_of_values() -> None:
    assert elements(Type("f32", ("T", 64)), SIZES) == 6 * 64
    assert size_bytes(Type("bf16", ("T", 64)), SIZES) == 6 * 64 * 2
    assert size_bytes(Type("q4", (64, 64)), SIZES) == 64 * 64 / 2 + 128 * 2 * 2
    assert size_bytes(Type("q8", (64, 64)), SIZES) == 64 * 64 + 128 * 2
    assert size_bytes(Type("place", ("T",)), SIZES) == 0


@pytest.mark.parametrize(
    ("op", "operands", "attrs", "num_flops", "num_bytes"),
    [
        # 6 rows of the table are read, not all of it
        ("embed", ("i32[T]", "@q8[512,64]"), {}, 0, 6 * 4 + 6 * 64 * (1 + 1 / 16) + 6 * 64 * 4),
        ("embed_place", ("place[T]", "@q8[512,64]"), {"by": "position"}, 0,
         6 * 64 * (1 + 1 / 16) + 6 * 64 * 4),
        # a multiplication and an addition for each weight and token
        ("linear", ("bf16[T,64]", "@bf16[96,64]"), {}, 2 * 6 * 64 * 96,
         6 * 64 * 2 + 96 * 64 * 2 + 6 * 96 * 4),
        ("add", ("f32[T,64]", "f32[T,64]"), {}, 6 * 64, 3 * 6 * 64 * 4),
        # one adapter's factor is read, not all three
        ("shrink", ("bf16[T,64]", "@lora[3,8,64]", "adapters[T]"), {}, 2 * 6 * 64 * 8,
         6 * 64 * 2 + 8 * 64 * 4 + 6 * 8 * 4),
        ("expand", ("f32[T,96]", "f32[T,8]", "@lora16[3,96,8]", "adapters[T]"), {},
         2 * 6 * 8 * 96 + 6 * 96, 2 * 6 * 96 * 4 + 6 * 8 * 4 + 96 * 8 * 2),
        # two of the six rows
        ("select_rows", ("f32[T,64]", "i32[R]"), {}, 0, 2 * 4 + 2 * 2 * 64 * 4),
        # keys and values are read as f32 and stored as bf16
        ("kv_write", ("f32[T,64]", "f32[T,64]", "place[T]"), KV | {"to": "bf16"}, 0,
         2 * 6 * 64 * (4 + 2)),
        # 21 pairs of query and key, each twice 4 heads of 32; 9 positions are read once
        ("attention", ("bf16[T,128]", "kv[2,32]", "place[T]"), ATTENTION, 21 * 4 * 128,
         6 * 128 * 2 + 2 * 9 * 64 * 2 + 6 * 128 * 4),
    ],
)  # fmt: skip
def test_work_is_counted(
    op: str,
    operands: tuple[str, ...],
    attrs: dict[str, Attr],
    num_flops: int,
    num_bytes: float,
) -> None:
    node, types = finish(op, *operands, **attrs)
    assert flops(node, types, SIZES) == num_flops
    assert moved_bytes(node, types, SIZES, cache="bf16") == num_bytes

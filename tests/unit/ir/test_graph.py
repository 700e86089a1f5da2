"""The graph's own helpers: types, names, fused nodes, and the weights of repeated layers."""

import pytest

from tokenmill.ir.graph import Names, Node, Type, Value, fuse, layer_bodies, walk
from tokenmill.ir.text import parse

MODEL = parse(
    """
    graph tiny {
      func main(%tokens: i32[T], %place: place[T]) weights(@embed: w[8,4], @norm: f32[4]) {
        %x = embed(%tokens, @embed) : f32[T,4]
        %y = repeat(%x, %place) {prefix='layers', bodies=('a', 'b'), order=(0, 1, 0)} : f32[T,4]
        %z = rmsnorm(%y, @norm) {eps=1e-05} : f32[T,4]
        return %z
      }
      func a(%x: f32[T,4], %place: place[T]) weights(@q: w[4,4]) {
        %q = linear(%x, @q) : f32[T,4]
        return %q
      }
      func b(%x: f32[T,4], %place: place[T]) weights(@bias: f32[4], @q: w[4,4]) {
        %q = linear(%x, @q, @bias) : f32[T,4]
        return %q
      }
    }
    """
)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("f32", Type("f32")),
        ("i32[R]", Type("i32", ("R",))),
        ("bf16[T,64]", Type("bf16", ("T", 64))),
        ("kv[2,32]", Type("kv", (2, 32))),
    ],
)
def test_types_are_written_and_read(text: str, kind: Type) -> None:
    assert str(kind) == text
    assert Type.parse(text) == kind


@pytest.mark.parametrize(
    "text", ["", "f32[", "f32[]", "f32[T,]", "f32[T 4]", "f32[T]x", "f32[T]\n"]
)
def test_what_is_no_type_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a type"):
        Type.parse(text)


def test_weights_of_repeated_layers_are_spelled_out() -> None:
    assert {name: str(kind) for name, kind in MODEL.weights().items()} == {
        "embed": "w[8,4]",
        "norm": "f32[4]",
        "layers.0.q": "w[4,4]",
        "layers.1.bias": "f32[4]",
        "layers.1.q": "w[4,4]",
        "layers.2.q": "w[4,4]",
    }


def test_layers_run_their_bodies_in_order() -> None:
    [repeat] = [n for n in MODEL.main.nodes if n.op == "repeat"]
    assert layer_bodies(repeat) == ["a", "b", "a"]


def test_unknown_functions_and_attributes_are_named() -> None:
    with pytest.raises(KeyError, match="graph tiny has no function c"):
        MODEL.function("c")
    with pytest.raises(KeyError, match="embed has no attribute eps"):
        MODEL.main.nodes[0].attr("eps")


def test_fuse_takes_what_is_made_outside_and_shows_what_is_wanted() -> None:
    norm, other = MODEL.main.nodes[2], Node("silu", ("%z",), (Value("%s", Type("f32", ("T", 4))),))
    fused = fuse([norm, other], ["%s"])
    assert fused.operands == ("%y", "@norm")
    assert [v.name for v in fused.results] == ["%s"]
    assert fused.leaves == (norm, other)
    assert norm.leaves == (norm,)


def test_fusing_a_fused_node_flattens_it() -> None:
    first, second = MODEL.main.nodes[0], MODEL.main.nodes[2]
    inner = fuse([first], ["%x"])
    assert fuse([inner, second], ["%z"]).body == (first, second)


def test_walk_visits_fused_nodes_before_their_leaves() -> None:
    first, second = MODEL.main.nodes[0], MODEL.main.nodes[2]
    fused = fuse([first, second], ["%z"])
    assert list(walk([fused])) == [fused, first, second]


def test_with_attrs_keeps_the_order_of_attributes() -> None:
    node = Node("kv_write", (), (), (("head_dim", 4), ("to", "f32")))
    assert node.with_attrs(to="bf16").attrs == (("head_dim", 4), ("to", "bf16"))


def test_names_are_never_handed_out_twice() -> None:
    names = Names({"%x"})
    assert [names.fresh("%x"), names.fresh("%x"), names.fresh("%y"), names.fresh("%x.1")] == [
        "%x.1",
        "%x.2",
        "%y",
        "%x.1.1",
    ]

"""choose_formats: weights get their formats, and layers that differ get bodies of their own."""

from tests.file_check import check
from tokenmill.ir.build import FunctionBuilder, finish_graph
from tokenmill.ir.graph import Graph, Value, layer_bodies
from tokenmill.ir.text import parse, print_graph
from tokenmill.ir.verify import verify
from tokenmill.passes.choose_formats import choose_formats


def model(num_layers: int) -> Graph:
    def layer(f: FunctionBuilder, x: Value, place: Value) -> Value:
        return f.linear(f.linear(x, f.weight("a", 8, 8)), f.weight("b", 8, 8), f.weight("bias", 8))

    f = FunctionBuilder("main")
    tokens, place = f.param("tokens", "i32", "T"), f.param("place", "place", "T")
    table = f.weight("embed", 16, 8)
    x = f.repeat(num_layers, layer, f.embed(tokens, table), place)
    return finish_graph("tiny", f, f.linear(x, table))


def chosen(num_layers: int, **formats: str) -> Graph:
    """Formats by weight name with _ for the dots; q4 is the rest."""
    named = {name.replace("_", "."): form for name, form in formats.items()}
    graph = model(num_layers)
    matrices = (name for name, kind in graph.weights().items() if kind.dtype == "w")
    changed = choose_formats(graph, {name: named.get(name, "q4") for name in matrices})
    verify(changed)
    return changed


def test_layers_of_the_same_formats_share_a_body() -> None:
    check(
        print_graph(chosen(3, embed="q8")),
        """
        CHECK: weights(@embed: q8[16,8])
        CHECK: repeat({{.*}}) {prefix='layers', bodies=('layer',), order=(0, 0, 0)}
        CHECK: func layer({{.*}}) weights(@a: q4[8,8], @b: q4[8,8], @bias: f32[8])
        CHECK-NOT: func
        """,
    )


def test_layers_that_differ_get_a_copy_for_each_combination() -> None:
    check(
        print_graph(chosen(4, layers_1_b="q8", layers_2_a="bf16", layers_3_b="q8")),
        """
        CHECK: repeat({{.*}}) {prefix='layers', bodies=('layer', 'layer.1', 'layer.2'),
        CHECK-SAME: order=(0, 1, 2, 1)}
        CHECK: func layer({{.*}}) weights(@a: q4[8,8], @b: q4[8,8], @bias: f32[8])
        CHECK: func layer.1({{.*}}) weights(@a: q4[8,8], @b: q8[8,8], @bias: f32[8])
        CHECK: func layer.2({{.*}}) weights(@a: bf16[8,8], @b: q4[8,8], @bias: f32[8])
        """,
    )


def test_every_layer_keeps_its_own_format() -> None:
    formats = {"layers_0_a": "f32", "layers_1_b": "q8", "layers_2_a": "f32"}
    kinds = chosen(3, **formats).weights()
    for name, form in formats.items():
        assert kinds[name.replace("_", ".")].dtype == form
    assert kinds["layers.2.b"].dtype == "q4"


def test_two_runs_of_layers_do_not_share_names() -> None:
    graph = parse(
        """
        graph two {
          func main(%x: f32[T,8], %place: place[T]) {
            %y = repeat(%x, %place) {prefix='first', bodies=('layer',), order=(0, 0)} : f32[T,8]
            %z = repeat(%y, %place) {prefix='second', bodies=('layer',), order=(0,)} : f32[T,8]
            return %z
          }
          func layer(%x: f32[T,8], %place: place[T]) weights(@a: w[8,8]) {
            %a = linear(%x, @a) : f32[T,8]
            return %a
          }
        }
        """
    )
    formats = {"first.0.a": "q4", "first.1.a": "q8", "second.0.a": "f32"}
    changed = choose_formats(graph, formats)
    verify(changed)
    assert {name: kind.dtype for name, kind in changed.weights().items()} == formats
    bodies = [layer_bodies(node) for node in changed.main.nodes]
    assert bodies == [["layer", "layer.1"], ["layer.2"]]

"""Every rule of the verifier, broken once."""

import pytest

from tokenmill.ir.graph import Graph, Node, Value
from tokenmill.ir.text import parse
from tokenmill.ir.verify import IllegalGraphError, verify

MAIN = """
graph g {
  func main(%tokens: i32[T], %place: place[T]) weights(@embed: w[8,4], @norm: f32[4]) {
    %x = embed(%tokens, @embed) : f32[T,4]
    %y = repeat(%x, %place) {prefix='layers', bodies=('layer',), order=(0, 0)} : f32[T,4]
    %h, %n = fused {
      %n = rmsnorm(%y, @norm) {eps=1e-05} : f32[T,4]
      %s = silu(%n) : f32[T,4]
      %h = round(%s) {to='bf16'} : bf16[T,4]
    }
    barrier()
    %z = linear(%h, @embed) : f32[T,8]
    return %z, %n
  }
  func layer(%x: f32[T,4], %place: place[T]) weights(@q: w[4,4]) {
    %q = linear(%x, @q) : f32[T,4]
    %kv = kv_write(%q, %q, %place) {head_dim=2, to='f32'} : kv[2,2]
    %a = attention(%q, %kv, %place) {head_dim=2, scale=0.5} : f32[T,4]
    return %a
  }
}
"""


def changed(old: str, new: str) -> Graph:
    assert MAIN.count(old) == 1, old
    return parse(MAIN.replace(old, new))


def test_the_graph_that_is_changed_below_is_legal() -> None:
    verify(parse(MAIN))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # names
        ("%z = linear", "%x = linear", "main: %x is made twice"),
        ("%z = linear", "%s = linear", "main: %s is made twice"),
        ("%y = repeat(%x, ", "%y = repeat(%z, ", "main: repeat uses %z before it is made"),
        ("silu(%n)", "silu(%h)", "main: silu uses %h before it is made"),
        ("linear(%h, @embed)", "linear(%s, @embed)", "main: linear uses %s before it is made"),
        ("return %z", "return %q", "main: returns %q, which is never made"),
        ("(%x: f32[T,4], %place", "(@x: f32[T,4], %place", "layer: '@x' is no name of the form"),
        # types
        ("@norm: f32[4]", "@norm: f33[4]", "main: @norm has no legal type: f33[4]"),
        ("@norm: f32[4]", "@norm: f32[X]", "main: @norm has no legal type: f32[X]"),
        ("@norm: f32[4]", "@norm: f32[0]", "main: @norm has no legal type: f32[0]"),
        ("%q = linear(%x, @q) : f32[T,4]", "%q = linear(%x, @q) : f32[T,8]", "is stated f32[T,8]"),
        ("silu(%n)", "tanh(%n)", "main: %s: there is no operation 'tanh'"),
        ("@norm: f32[4]", "@norm: f32[8]", "main: %n: the weight must be f32[4], is f32[8]"),
        # fused
        ("%s = silu", "barrier()\n%s = silu", "main: fused holds a barrier"),
        # repeat
        ("'layer',", "'layers',", "main: repeat runs layers, which is no layer"),
        ("order=(0, 0)", "order=(0, 1)", "main: repeat's order (0, 1)"),
        ("order=(0, 0)", "times=2", "main: repeat takes prefix, bodies, order"),
        ("order=(0, 0)} : f32[T,4]", "order=(0, 0)} : f32[T,8]", "main: repeat gives its first"),
        ("layer(%x: f32[T,4]", "layer(%x: f32[R,4]", "main: repeat gives layer"),
        ("return %a", "return %kv", "main: layer must return its first parameter's type"),
        ("return %a", "return %a, %a", "main: layer must return its first parameter's type"),
        # a layer's cache
        (
            "return %a",
            "%kv2 = kv_write(%a, %a, %place) {head_dim=2, to='f32'} : kv[2,2]\nreturn %a",
            "layer: a layer has one cache",
        ),
    ],
)
def test_a_broken_rule_is_named(old: str, new: str, message: str) -> None:
    with pytest.raises(IllegalGraphError) as error:
        verify(changed(old, new))
    assert message in str(error.value)


def test_two_functions_of_one_name_are_refused() -> None:
    graph = parse(MAIN)
    with pytest.raises(IllegalGraphError, match="two of one name"):
        verify(Graph("g", (*graph.functions, graph.functions[1])))


def test_a_graph_without_functions_is_refused() -> None:
    with pytest.raises(IllegalGraphError, match="no function"):
        verify(Graph("g", ()))


def test_two_repeats_may_not_share_their_weights_names() -> None:
    again = "%y = repeat(%x, %place) {prefix='layers', bodies=('layer',), order=(0, 0)} : f32[T,4]"
    graph = changed(again, f"{again}\n{again.replace('%y', '%w')}")
    with pytest.raises(IllegalGraphError, match="two repeats of one prefix"):
        verify(graph)


def test_only_main_repeats() -> None:
    repeat = "%r = repeat(%x, %place) {prefix='p', bodies=('layer',), order=(0,)} : f32[T,4]"
    with pytest.raises(IllegalGraphError, match="layer: only main may repeat"):
        verify(changed("%q = linear(%x, @q)", f"{repeat}\n%q = linear(%r, @q)"))


def with_node(index: int, node: Node) -> Graph:
    """MAIN with one of main's nodes replaced."""
    graph = parse(MAIN)
    nodes = (*graph.main.nodes[:index], node, *graph.main.nodes[index + 1 :])
    return Graph("g", (graph.main.with_nodes(nodes), *graph.functions[1:]))


def test_a_fused_node_shows_something_in_the_order_of_its_body() -> None:
    fused = parse(MAIN).main.nodes[2]
    for results in ((), fused.results[::-1]):
        node = Node("fused", fused.operands, results, (), fused.body)
        with pytest.raises(IllegalGraphError, match="fused"):
            verify(with_node(2, node))


def test_a_fused_node_takes_what_its_body_takes() -> None:
    fused = parse(MAIN).main.nodes[2]
    node = Node("fused", (*fused.operands, "%x"), fused.results, (), fused.body)
    with pytest.raises(IllegalGraphError, match="does not fit its body"):
        verify(with_node(2, node))


def test_plain_nodes_make_one_value_and_barriers_none() -> None:
    embed = parse(MAIN).main.nodes[0]
    twice = Node("embed", embed.operands, (*embed.results, Value("%x2", embed.result.type)))
    with pytest.raises(IllegalGraphError, match="embed makes one value"):
        verify(with_node(0, twice))
    with pytest.raises(IllegalGraphError, match="a barrier takes and makes nothing"):
        verify(with_node(3, Node("barrier", ("%x",), ())))

"""The text form is exact both ways, and says where a text goes wrong."""

from keyword import iskeyword
from string import ascii_letters

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backend.graphs import Case, cases
from tokenmill.ir.graph import Attr, Function, Graph, Node, Type, Value, fuse
from tokenmill.ir.text import GraphSyntaxError, parse, print_graph
from tokenmill.passes.pipeline import SPMD_PASSES, run_passes

words = st.text(ascii_letters, min_size=1, max_size=6).filter(
    lambda word: not iskeyword(word) and word != "fused"
)
types = st.builds(
    Type,
    st.sampled_from(("f32", "bf16", "q4", "place", "kv")),
    st.lists(st.integers(0, 999) | st.sampled_from("TRS"), max_size=3).map(tuple),
)
attrs: st.SearchStrategy[dict[str, Attr]] = st.dictionaries(
    words,
    st.one_of(
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.booleans(),
        st.text(),
        st.lists(st.integers()).map(tuple),
        st.lists(st.text()).map(tuple),
    ),
    max_size=3,
)


@st.composite
def any_functions(draw: st.DrawFn) -> Function:
    """Functions that are well formed and make no sense."""
    values = [Value(f"%{w}", draw(types)) for w in draw(st.lists(words, min_size=2, unique=True))]
    params, made = values[:1], values[1:]
    names = st.lists(st.sampled_from([v.name for v in values]), max_size=3).map(tuple)
    nodes = [Node(draw(words), draw(names), (v,), tuple(draw(attrs).items())) for v in made]
    if draw(st.booleans()):
        shown = draw(st.lists(st.sampled_from([v.name for v in made]), min_size=1))
        nodes = [fuse(nodes, shown), Node("barrier", (), ())]
    weights = [Value(f"@{word}", draw(types)) for word in draw(st.lists(words, max_size=2))]
    return Function(draw(words), tuple(params), tuple(weights), tuple(nodes), draw(names))


@given(words, st.lists(any_functions(), max_size=3))
def test_any_graph_comes_back_as_it_was(name: str, functions: list[Function]) -> None:
    graph = Graph(name, tuple(functions))
    assert parse(print_graph(graph)) == graph


@settings(deadline=None, max_examples=30)
@given(cases())
def test_models_come_back_after_every_pass(case: Case) -> None:
    def check(name: str, graph: Graph) -> None:
        assert parse(print_graph(graph)) == graph, name

    check("build", case.graph)
    check("numeric passes", case.numeric)
    run_passes(case.numeric, SPMD_PASSES, check)


def test_the_text_form_is_as_documented() -> None:
    text = """graph tiny {
  func main(%tokens: i32[T], %place: place[T]) weights(@embed: q8[512,64]) {
    %x = embed(%tokens, @embed) : f32[T,64]
    barrier()
    %r, %h = fused {
      %r = rope(%x, %place) {head_dim=32, theta=10000.0} : f32[T,64]
      %h = round(%r) {to='bf16'} : bf16[T,64]
    }
    return %r, %h
  }
}
"""
    assert print_graph(parse(text)) == text


def test_comments_and_indentation_do_not_matter() -> None:
    plain = "graph g {\nfunc f(%x: f32[T,4]) {\n%y = silu(%x) : f32[T,4]\nreturn %y\n}\n}\n"
    spread = plain.replace("\n", "\n\n   // what follows\n  ")
    assert parse(spread) == parse(plain)


def wrap(line: str) -> str:
    """A graph with this as its third line."""
    return f"graph g {{\nfunc f(%x: f32[T,4]) {{\n{line}\nreturn %x\n}}\n}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text ends where graph NAME { was expected"),
        ("grape g {", "line 1: expected graph NAME {, found 'grape g {'"),
        ("graph g {\n\nfunc f(%x: f32) {\n", "the text ends where a node or return was expected"),
        ("graph g {\nfunc f {\n", "line 2: expected func NAME(...) {"),
        ("graph g {\nfunc f(x: f32) {\n", "line 2: expected %name: type"),
        ("graph g {\nfunc f(%x: f32[) {\n", "line 2: expected a type such as f32[T,64]"),
        ("graph g {\nfunc f(%x: f32, %y) {\n", "line 2: expected a type such as f32[T,64]"),
        (wrap("%y = silu(%x) : f32[T,4"), "line 3: expected a type such as f32[T,64]"),
        (wrap("%y = silu(%x)"), "line 3: expected one type for each result"),
        (wrap("%y, %z = silu(%x) : f32"), "line 3: expected one type for each result"),
        (wrap("%y = silu(x) : f32"), "line 3: expected %x = op(...) : type"),
        (wrap("%y = silu %x : f32"), "line 3: expected %x = op(...) : type"),
        (wrap("%y = round(%x) {to: 'bf16'} : f32"), "line 3: expected attributes"),
        (wrap("%y = round(%x) {to=bf16} : f32"), "line 3: expected attributes"),
        (wrap("%y = round(%x) {'bf16'} : f32"), "line 3: expected attributes"),
        (wrap("%y = round(%x) {to={}} : f32"), "line 3: expected attributes"),
        (wrap("%y = fused {\n%z = silu(%x) : f32\n}"), "line 5: fused shows %y, never made inside"),
        (wrap("return y\n}"), "line 3: expected return %x, ..."),
        (wrap("return %x"), "line 4: expected }"),
        (wrap("%y = silu(%x) : f32") + "func g", "line 7: expected the end of the text"),
    ],
)
def test_a_text_that_is_no_graph_says_where(text: str, message: str) -> None:
    with pytest.raises(GraphSyntaxError) as error:
        parse(text)
    assert str(error.value).startswith(message)

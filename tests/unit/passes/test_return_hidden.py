"""return_hidden: a decoder's step gives last hidden states beside its logits."""

import numpy as np
import pytest

from tests.backend.graphs import random_weights
from tests.file_check import check
from tests.unit.passes.pass_text import graph_of
from tokenmill.backends.reference.interpreter import Interpreter
from tokenmill.ir.text import parse, print_graph
from tokenmill.ir.verify import verify
from tokenmill.passes.return_hidden import return_hidden

STEP = (
    "%r = select_rows(%x, %rows) : f32[R,64]\n"
    "%n = rmsnorm(%r, @norm) {eps=1e-05} : f32[R,64]\n"
    "%logits = linear(%n, @q) : f32[R,128]\n"
)


def test_selection_and_norm_stand_there_twice() -> None:
    changed = return_hidden(graph_of(STEP + "return %logits"))
    verify(changed)
    assert parse(print_graph(changed)) == changed
    check(
        print_graph(changed),
        """
        CHECK: %logits = linear(%n, @q)
        CHECK-NEXT: %r.pooled = select_rows(%x, %pooled) : f32[E,64]
        CHECK-NEXT: %n.pooled = rmsnorm(%r.pooled, @norm) {eps=1e-05} : f32[E,64]
        CHECK-NEXT: return %logits, %n.pooled
        """,
    )


def test_states_are_those_that_the_head_would_read() -> None:
    graph = return_hidden(graph_of(STEP + "return %logits, %n"))
    x = np.random.default_rng(0).standard_normal((5, 64), np.float32)
    inputs = {p.name: None for p in graph.main.params}
    inputs |= {"%x": x, "%rows": np.array([1, 4]), "%pooled": np.array([1, 2, 4])}
    weights = random_weights(graph, ["q4"], seed=0)
    _, normed, states = Interpreter(graph=graph, weights=weights, caches={}).run(inputs)
    assert np.array_equal(states[[0, 2]], normed)


def test_a_graph_that_ends_in_another_way_is_refused() -> None:
    with pytest.raises(ValueError, match="0 nodes read"):
        return_hidden(graph_of("%n = rmsnorm(%x, @norm) {eps=1e-05} : f32[T,64]\nreturn %n"))

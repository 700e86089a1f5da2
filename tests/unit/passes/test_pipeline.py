"""The passes in order, on random graphs: legal after each, and the same to the last bit."""

from hypothesis import HealthCheck, given, settings

from tests.backend.graphs import Case, cases
from tests.unit.passes.pass_text import assert_same
from tokenmill.passes.choose_formats import choose_formats
from tokenmill.passes.clean_up import clean_up
from tokenmill.passes.pipeline import SPMD_PASSES, numeric_passes, run_passes

random_graphs = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))


@random_graphs
@given(cases())
def test_passes_that_regroup_change_no_bit(case: Case) -> None:
    run_passes(case.numeric, SPMD_PASSES, lambda name, graph: assert_same(case.numeric, graph))


@random_graphs
@given(cases())
def test_cleaning_changes_no_bit_and_cleans_all(case: Case) -> None:
    typed = choose_formats(case.graph, case.formats)
    cleaned = clean_up(typed)
    assert_same(typed, cleaned)
    assert clean_up(cleaned) == cleaned


@random_graphs
@given(cases(activations=("f32",)))
def test_float32_throughout_changes_no_bit(case: Case) -> None:
    typed = choose_formats(case.graph, case.formats)
    passes = numeric_passes(formats=case.formats, activations="f32", cache="f32")
    run_passes(case.graph, passes, lambda name, graph: assert_same(typed, graph))

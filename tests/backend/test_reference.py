"""The suite on the reference itself, at several stages of the pipeline."""

import pytest

from tests.backend.graphs import Case
from tests.backend.suite import CHECKS, Check, run_check
from tokenmill.backends.base import StepLimits
from tokenmill.backends.reference.model import ReferenceModel
from tokenmill.passes.pipeline import SPMD_PASSES, run_passes

STAGES = range(0, len(SPMD_PASSES) + 1, 3)


@pytest.mark.parametrize("num_passes", STAGES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_reference_passes_the_suite(check: Check, num_passes: int) -> None:
    def make_model(case: Case, limits: StepLimits) -> ReferenceModel:
        graph = run_passes(case.numeric, SPMD_PASSES[:num_passes])
        return ReferenceModel(graph, case.weights, limits=limits)

    run_check(check, make_model, max_examples=12)

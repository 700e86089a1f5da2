"""The suite on the LLVM backend: on the best instruction set here, and forced on the others."""

import pytest

from tests.backend.graphs import Case
from tests.backend.llvm_models import make_llvm_model
from tests.backend.suite import CHECKS, Check, check_adapters, check_same_bits, run_check
from tests.unit.llvm.native import WHOLE_ROWS
from tokenmill.backends.base import StepLimits
from tokenmill.backends.llvm.model import LlvmModel
from tokenmill.backends.llvm.objects import ObjectCache

NUM_EXAMPLES, NUM_FORCED = 12, 2
"""How many random graphs the best instruction set of this machine is tried on, and every other."""


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> ObjectCache:
    """Code that all checks share: they get the same cases, and compiling is what takes long."""
    return ObjectCache(tmp_path_factory.mktemp("objects"))


@pytest.mark.parametrize("row", [None, *WHOLE_ROWS[1:]])
@pytest.mark.parametrize(
    "check", [*CHECKS, check_same_bits, check_adapters], ids=lambda check: check.__name__
)
def test_llvm_passes_the_suite(check: Check, row: str | None, objects: ObjectCache) -> None:
    def make_model(case: Case, limits: StepLimits) -> LlvmModel:
        return make_llvm_model(
            case.graph,
            case.weights,
            limits=limits,
            objects=objects,
            activations=case.activations,
            cache=case.cache,
            row=row,
        )

    num_examples = NUM_FORCED if row else NUM_EXAMPLES
    if check is check_adapters:  # its graphs are no other check's, so all is compiled for it alone
        num_examples //= 2
    run_check(check, make_model, max_examples=num_examples)

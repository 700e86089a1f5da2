"""Instruction sets that promise the same bits give them, on this processor and on others.

TOKENMILL_TEST_BITS names a folder in which a run leaves what the model said; a run on another kind
of processor that is given the same folder must find that its own says nothing else.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.backend.traffic import Traffic, run_traffic, shuffled_tables
from tests.e2e.test_invariance import compiled_model, whole_steps
from tests.unit.llvm.native import ROW_NAMES
from tokenmill import LLM, SamplingParams
from tokenmill.backends.llvm.target import ENVIRONMENT_VARIABLE
from tokenmill.config import ACTIVATIONS

FOLDER = os.environ.get("TOKENMILL_TEST_BITS")
OWN_BITS = {"portable": ACTIVATIONS, "neon-bf16": ("bf16", "int8")}
"""Rows with a rounding of their own, and for which activations (int8 comes with a cache of bf16);
see docs/architecture.md."""

LENGTHS = (37, 20, 1)
PARAMS = (
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=1, seed=1, max_tokens=24, ignore_eos=True),
)


def what_is_said(path: Path, activations: str) -> dict[str, object]:
    """A digest of the logits of all tokens of some prompts, and what comes after them."""
    rng = np.random.default_rng(30)
    with compiled_model(path, activations, 2) as model:
        prompts = tuple(rng.integers(0, model.limits.vocab_size, n, np.int32) for n in LENGTHS)
        tables = shuffled_tables(rng, model.limits, LENGTHS)
        traffic = Traffic(sequences=prompts, tables=tables, steps=whole_steps(LENGTHS))
        logits = run_traffic(model, traffic)
    with LLM(str(path), max_model_len=256, activations=activations, threads=2) as llm:
        outputs = llm.generate([p.tolist() for p in prompts[: len(PARAMS)]], list(PARAMS))
    return {
        "logits": hashlib.sha256(np.concatenate(logits).tobytes()).hexdigest(),
        "tokens": [output.token_ids for output in outputs],
    }


@pytest.mark.slow
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_a_model_says_the_same_on_every_row_that_promises_it(
    small_qwen: Path, caches: Path, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {}
    for row in ROW_NAMES:
        if activations not in OWN_BITS.get(row, ()):
            monkeypatch.setenv(ENVIRONMENT_VARIABLE, row)
            said[row] = what_is_said(small_qwen, activations)
    first = next(iter(said.values()))
    assert said == dict.fromkeys(said, first)
    if FOLDER:
        file = Path(FOLDER) / f"{activations}.json"
        if file.exists():
            assert json.loads(file.read_text()) == first
        else:
            file.write_text(json.dumps(first))

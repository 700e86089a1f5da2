"""A model with ropes for texts beyond its first context, loaded for shorter and for longer ones."""

from pathlib import Path

import pytest

from tests.e2e.architecture_files import CASES, Case, make_model
from tests.unit import tiny_tokenizers
from tokenmill import LLM
from tokenmill.errors import UsageError

FIRST, LONGEST = 700, 4096


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENMILL_HOME", str(tmp_path / "home"))
    case = CASES["phi 4 mini"]
    options = {**case.options, "vocab_size": 300, "num_hidden_layers": 1}
    make_model(Case(family=case.family, options=options, arch=case.arch)).save_pretrained(tmp_path)
    return tiny_tokenizers.write_folder(tmp_path)


def test_the_ropes_follow_max_model_len(folder: Path) -> None:
    ropes = {}
    for asked, given in ((None, FIRST), (FIRST, FIRST), (FIRST + 1, FIRST + 1)):
        with LLM(str(folder), max_model_len=asked) as llm:
            assert llm.max_model_len == given
            ropes[asked] = llm.loaded.config.layers[0].rope
            if given == FIRST:
                with pytest.raises(UsageError, match=f"raise max_model_len, up to {LONGEST}"):
                    llm.generate([[1] * FIRST])
            else:
                assert len(llm.generate([[1] * FIRST])[0].token_ids) == 1
    assert ropes[None] == ropes[FIRST] != ropes[FIRST + 1]
    with pytest.raises(UsageError, match=f"the model was made for {LONGEST} tokens"):
        LLM(str(folder), max_model_len=LONGEST + 1)

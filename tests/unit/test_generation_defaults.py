"""A model from a folder, as far as an engine gets to see it."""

from pathlib import Path

import pytest
from model_files import HIDDEN, random_floats, random_weights, write_hf_folder
from tiny_tokenizers import SPECIAL, base_tokens, write_folder

from tokenmill import LLM, SamplingParams
from tokenmill.errors import UsageError

VOCAB = len(base_tokens()) + len(SPECIAL) + 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENMILL_HOME", str(tmp_path / "home"))
    weights = random_weights(is_tied=True) | {"embed": random_floats(VOCAB, HIDDEN)}
    changes = {"vocab_size": VOCAB, "tie_word_embeddings": True}
    return write_hf_folder(tmp_path / "model", weights, changes=changes)


def test_what_the_makers_recommend_arrives(folder: Path) -> None:
    recommended = {"temperature": 0.25, "top_k": 7, "max_new_tokens": 5, "do_sample": True}
    write_folder(folder, generation_config=recommended)
    with LLM(str(folder), threads=1, max_num_seqs=2, max_num_batched_tokens=16) as llm:
        assert llm.default_params() == SamplingParams(temperature=0.25, top_k=7, max_tokens=5)
        [output] = llm.generate("hello")
        assert output.num_output_tokens == 5
        assert output.finish_reason == "length"


def test_a_recommendation_that_is_none_is_refused_at_start(folder: Path) -> None:
    write_folder(folder, generation_config={"temperature": -1})
    with pytest.raises(UsageError, match=r"generation_config.json: temperature is -1"):
        LLM(str(folder), threads=1, max_num_seqs=2, max_num_batched_tokens=16)

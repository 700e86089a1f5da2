"""Qwen2.5's real tokenizer, where it is at hand: from the GGUF file, and from its own folder."""

import os
from pathlib import Path

import pytest

from tokenmill.models.checkpoint import open_checkpoint
from tokenmill.models.text.load import load_tokenizer
from tokenmill.models.text.tokenizer import Tokenizer

FOLDER_VARIABLE = "TOKENMILL_TEST_QWEN_TOKENIZER"
"""Names a folder with the tokenizer.json of a Qwen2.5 model."""

NUM_ENTRIES = 151_665
TEXT = (
    "It's 2026, 12345 wörter…\n\n  def f(x):\t<|im_start|>用户 <tool_call>\r\n"
    "🙂e\N{COMBINING ACUTE ACCENT}"
)


@pytest.fixture(scope="module")
def from_gguf(qwen: Path) -> Tokenizer:
    metadata = open_checkpoint(qwen).tokenizer_metadata
    assert metadata is not None
    return load_tokenizer(metadata)


@pytest.fixture(scope="module")
def folder() -> Path:
    if FOLDER_VARIABLE not in os.environ:
        pytest.skip(f"{FOLDER_VARIABLE} names no folder")
    return Path(os.environ[FOLDER_VARIABLE])


def test_the_gguf_file_has_its_entries_without_the_padding(from_gguf):
    assert from_gguf.vocab_size == NUM_ENTRIES
    assert from_gguf.encode("<|endoftext|><|file_sep|>") == [151_643, NUM_ENTRIES - 1]
    assert 151_645 in from_gguf.eos_ids


def test_the_folder_has_them_and_encodes_as_the_library_does(folder):
    from tokenizers import Tokenizer as Backend

    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == NUM_ENTRIES
    reference = Backend.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode(TEXT) == reference.encode(TEXT).ids


def test_both_encode_alike(from_gguf, folder):
    tokenizer = load_tokenizer(folder)
    text = (Path(__file__).parents[2] / "README.zh-CN.md").read_text()
    for sample in (TEXT, text):
        assert from_gguf.encode(sample) == tokenizer.encode(sample)
        assert from_gguf.decode(from_gguf.encode(sample)) == tokenizer.decode(
            tokenizer.encode(sample)
        )

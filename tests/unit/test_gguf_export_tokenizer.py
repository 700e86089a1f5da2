"""Tokenizers of folders as GGUF metadata: what is read back says the same."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from model_files import HF_CONFIG
from tiny_tokenizers import gguf_metadata, qwen_like_backend, sentencepiece_metadata
from tokenizers import pre_tokenizers

from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.models.config import ModelConfig
from tokenmill.models.gguf.export_tokenizer import tokenizer_metadata
from tokenmill.models.read_config import config_from_hf
from tokenmill.models.text.load import load_tokenizer
from tokenmill.models.text.pretokenizers import PRE_TOKENIZERS
from tokenmill.models.text.tokenizer import Tokenizer

# ruff: noqa: RUF001 - the letters are meant to be of several scripts
TEXTS = [
    "hello world",
    "It's 1234!!\n  x",
    "é <|im_end|> hh",
    "",
    "  hi hi",
    "Юг東京Tower's DON'T",
]


def config(num_rows: int) -> ModelConfig:
    return replace(config_from_hf("m", "m", HF_CONFIG, {}), vocab_size=num_rows, eos_ids=())


def write_folder(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    named = {**tokenizer.named_tokens, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def exported(folder: Path, num_rows: int) -> dict[str, Any]:
    metadata = tokenizer_metadata(folder, config(num_rows))
    return {key: value for key, (_, value) in metadata.items()}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@pytest.mark.parametrize("add_bos", [True, False])
def test_a_byte_level_tokenizer_comes_back(pre: str, add_bos: bool, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(gguf_metadata(pre, add_bos_token=add_bos))
    metadata = exported(write_folder(tmp_path, tokenizer), 300)
    found = PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]]
    assert (found.patterns, found.ignore_merges) == (
        PRE_TOKENIZERS[pre].patterns,
        PRE_TOKENIZERS[pre].ignore_merges,
    )
    again = load_tokenizer(metadata)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text), text
    assert again.special_ids == tokenizer.special_ids
    assert again.vocab_size == tokenizer.vocab_size
    assert len(metadata["tokenizer.ggml.tokens"]) == 300


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_comes_back(prefix: bool, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_metadata(add_space_prefix=prefix))
    metadata = exported(write_folder(tmp_path, tokenizer), 266)
    assert metadata["tokenizer.ggml.model"] == "llama"
    again = load_tokenizer(metadata)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text), text
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_hugging_face_s_own_steps_are_known_by_what_they_do(tmp_path: Path) -> None:
    """SmolLM's tokenizer.json has no pattern: digits by themselves, then GPT-2's words."""
    backend = qwen_like_backend()
    backend.normalizer = None  # type: ignore[assignment]
    digits, words = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])  # type: ignore[assignment]
    folder = write_folder(tmp_path, Tokenizer(backend))
    assert exported(folder, 300)["tokenizer.ggml.pre"] == "smollm"
    backend.pre_tokenizer = words  # type: ignore[assignment]
    folder = write_folder(tmp_path, Tokenizer(backend))
    assert exported(folder, 300)["tokenizer.ggml.pre"] == "gpt-2"


def test_templates_by_name_go_along(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    folder = write_folder(tmp_path, load_tokenizer(gguf_metadata()), chat_template=templates)
    assert load_tokenizer(exported(folder, 300)).chat_templates == {"default": "a", "tool_use": "b"}


def test_what_gguf_cannot_say_is_refused(tmp_path: Path) -> None:
    backend = qwen_like_backend()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match="cuts text as no pre-tokenizer does"):
        exported(write_folder(tmp_path, Tokenizer(backend)), 300)
    spec = json.loads(qwen_like_backend().to_str())
    spec["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    spec["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="model is 'WordLevel', supported is 'BPE'"):
        exported(tmp_path, 300)
    with pytest.raises(ModelFileError, match="has 269 entries, the embedding 100 rows"):
        exported(write_folder(tmp_path, load_tokenizer(gguf_metadata())), 100)

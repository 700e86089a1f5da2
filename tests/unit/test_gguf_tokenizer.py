"""Tokenizers built from GGUF metadata, and their cache on disk."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import (
    CONTROL,
    MERGES,
    NORMAL,
    UNUSED,
    base_tokens,
    gguf_metadata,
    qwen_like_backend,
    sentencepiece_metadata,
)
from tokenizers import pre_tokenizers

from tests.unit.notes import Notes
from tokenmill.errors import ModelFileError, UnsupportedModelError, UsageError
from tokenmill.models.gguf.tokenizer import load_gguf_tokenizer
from tokenmill.models.text.load import load_tokenizer
from tokenmill.models.text.pretokenizers import PRE_TOKENIZERS
from tokenmill.models.text.tokenizer import Tokenizer

NUM_BASE = len(base_tokens())
TEXTS = st.text() | st.text(st.sampled_from("hello wor 'LLs 1234 \n\té.,!")).map(str)


def words(pre: str, text: str) -> list[str]:
    """How a text is cut, by a vocabulary that merges nothing across or within words."""
    backend = load_tokenizer(gguf_metadata(pre))._backend
    assert backend.pre_tokenizer is not None
    return [text[a:b] for _, (a, b) in backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["It", "'s", " 1234", "!!", "\n ", " x"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "!!", "\n ", " x"]),
        ("llama-bpe", ["It", "'s", " ", "123", "4", "!!\n", " ", " x"]),
        ("dbrx", ["It", "'s", " ", "123", "4", "!!\n", " ", " x"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "!!\n", " ", " x"]),
        ("tekken", ["It", "'s", " ", "1", "2", "3", "4", "!!\n", " ", " x"]),
        ("gpt-4o", ["It's", " ", "123", "4", "!!\n", " ", " x"]),
        ("default", ["It", "'", "s", " ", "123", "4", "!!", "\n ", " x"]),
    ],
)
def test_each_pre_tokenizer_cuts_as_its_model_does(pre: str, expected: list[str]) -> None:
    assert words(pre, "It's 1234!!\n  x") == expected


# ruff: noqa: RUF001 - the letters are meant to be of several scripts
MIXED = "camelCaseHTTPServer's DON'T x12345 Привет МИР東京Tower e\u0301É //\n\n a/b ǅu हिन्दी٣٤\n"
CUT_MIXED = {
    "tekken": [
        *("camel", "Case", "HTTPServer", "'s", " DON", "'T", " x", "1", "2", "3", "4", "5"),
        *(" Привет", " МИР東京Tower", " e\u0301", "É", " //\n\n", " a", "/b", " ǅu", " हिन्दी"),
        *("٣", "٤", "\n"),
    ],
    "gpt-4o": [
        *("camel", "Case", "HTTPServer's", " DON'T", " x", "123", "45"),
        *(" Привет", " МИР東京Tower", " e\u0301", "É", " //\n\n", " a", "/b", " ǅu", " हिन्दी"),
        *("٣٤", "\n"),
    ],
}
CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
CASED += r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|\p{N}%s|"
CASED += r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PUBLISHED = {  # in Mistral's tekken.json and OpenAI's o200k_base
    "tekken": CASED % ("", "", ""),
    "gpt-4o": CASED % (CONTRACTED, CONTRACTED, "{1,3}"),
}


@pytest.mark.parametrize("pre", CUT_MIXED)
def test_words_end_where_capitals_follow_small_letters(pre: str) -> None:
    assert words(pre, MIXED) == CUT_MIXED[pre]


@settings(deadline=None)
@given(
    st.sampled_from(list(PUBLISHED)),
    # Scripts of which all versions of Unicode say the same.
    st.text(st.characters(max_codepoint=0x24F)) | st.text(st.sampled_from(MIXED)),
)
def test_cased_words_are_those_of_the_published_patterns(pre: str, text: str) -> None:
    regex = pytest.importorskip("regex")
    assert words(pre, text) == regex.findall(PUBLISHED[pre], text)


def test_tekken_takes_tokens_whole_and_begins_a_sequence() -> None:
    row = PRE_TOKENIZERS["tekken"]
    assert (row.ignore_merges, row.add_bos) == (True, True)
    other = PRE_TOKENIZERS["gpt-4o"]
    assert (other.ignore_merges, other.add_bos) == (False, False)


@settings(deadline=None)
@given(TEXTS)
def test_single_digits_are_hugging_faces(text: str) -> None:
    reference = load_tokenizer(gguf_metadata("smollm"))._backend
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    assert load_tokenizer(gguf_metadata("smollm")).encode(text) == reference.encode(text).ids


@settings(deadline=None)
@given(TEXTS)
def test_qwen2_is_the_same_from_gguf_and_from_json(text: str) -> None:
    assert (
        load_tokenizer(gguf_metadata("qwen2")).encode(text) == qwen_like_backend().encode(text).ids
    )


def test_a_word_that_is_a_token_is_taken_whole_where_the_model_says_so() -> None:
    tokens = gguf_metadata()["tokenizer.ggml.tokens"]
    changed = [*tokens[:NUM_BASE], "xyz", *tokens[NUM_BASE + 1 :]]
    types = [NORMAL] * (NUM_BASE + 1) + [CONTROL] * 2 + [NORMAL]
    llama = load_tokenizer(gguf_metadata("llama-bpe", tokens=changed, token_type=types))
    assert llama.encode("xyz") == [NUM_BASE]
    gpt2 = load_tokenizer(gguf_metadata("gpt-2", tokens=changed, token_type=types))
    assert len(gpt2.encode("xyz")) == 3


def test_token_types_decide_what_is_special() -> None:
    tokenizer = load_tokenizer(gguf_metadata())
    assert tokenizer.special_ids == {NUM_BASE, NUM_BASE + 1, NUM_BASE + 2}
    ids = tokenizer.encode("<|im_end|><tool>")
    assert ids == [NUM_BASE + 2, NUM_BASE + 3]
    assert tokenizer.decode(ids) == "<tool>"


def test_roles_of_tokens() -> None:
    tokenizer = load_tokenizer(gguf_metadata(padding_token_id=NUM_BASE))
    assert tokenizer.bos_id == NUM_BASE + 1
    # The named end first, then what chat models end with too.
    assert tokenizer.eos_ids == (NUM_BASE + 2, NUM_BASE)
    assert tokenizer.named_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    assert tokenizer.chat_templates == {"default": "{{ messages[0].content }}"}


def test_ends_of_a_sequence_are_added_as_the_file_says() -> None:
    word = load_tokenizer(gguf_metadata()).encode("hello")
    bos, eos = NUM_BASE + 1, NUM_BASE + 2
    both = load_tokenizer(gguf_metadata(add_bos_token=True, add_eos_token=True))
    assert both.encode("hello") == [bos, *word, eos]
    assert both.encode("hello", add_special_tokens=False) == word
    unsaid = load_tokenizer(gguf_metadata("llama-bpe", add_bos_token=None))
    assert unsaid.encode("hello") == [bos, *word]


def test_padding_of_the_vocabulary_is_left_out() -> None:
    metadata = gguf_metadata()
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += [f"[PAD{size}]", f"[PAD{size + 1}]"]
    metadata["tokenizer.ggml.token_type"] += [UNUSED, UNUSED]
    tokenizer = load_tokenizer(metadata)
    assert tokenizer.vocab_size == size
    with pytest.raises(UsageError, match=f"token id {size} "):
        tokenizer.decode([size])


def test_types_may_be_left_out() -> None:
    tokenizer = load_tokenizer(gguf_metadata(token_type=None))
    assert tokenizer.special_ids == frozenset()
    assert tokenizer.decode(tokenizer.encode("hello é")) == "hello é"


class TestSentencePiece:
    TOKENIZER = load_tokenizer(sentencepiece_metadata())

    def spelled(self, text: str) -> list[str]:
        ids = self.TOKENIZER.encode(text)
        return [str(self.TOKENIZER._backend.id_to_token(token_id)) for token_id in ids]

    def test_the_token_of_highest_score_is_made_first(self) -> None:
        assert self.spelled("hi hi") == ["<s>", "▁hi", "▁hi"]
        assert self.spelled("  hh") == ["<s>", "▁▁", "▁h", "h"]

    def test_other_characters_become_bytes(self) -> None:
        assert self.spelled("é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
        assert self.TOKENIZER.id_to_bytes(3 + 0xC3) == b"\xc3"

    @settings(deadline=None)
    @given(st.text())
    def test_round_trip(self, text: str) -> None:
        if not any(token in text for token in ("<unk>", "<s>", "</s>")) and "▁" not in text:
            assert self.TOKENIZER.decode(self.TOKENIZER.encode(text)) == text

    def test_without_the_space_before_a_text(self) -> None:
        tokenizer = load_tokenizer(sentencepiece_metadata(add_space_prefix=False))
        hi = tokenizer.token_to_id("hi")
        assert tokenizer.encode("hi", add_special_tokens=False) == [hi]
        assert tokenizer.decode(tokenizer.encode(" hi")) == " hi"

    def test_there_is_a_score_for_every_token(self) -> None:
        with pytest.raises(ModelFileError, match="scores has 1 entries"):
            load_tokenizer(sentencepiece_metadata(scores=[0.0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "rwkv"}, "tokenizer model 'rwkv'"),
        ({"model": None}, "tokenizer model None"),
        ({"pre": "viking"}, "pre-tokenizer 'viking' .* supported are dbrx, .*smollm.* tekken"),
    ],
)
def test_what_we_do_not_have_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        load_tokenizer(gguf(**changes))


def gguf(**changes: Any) -> dict[str, Any]:
    pre = changes.pop("pre", "smollm")
    return gguf_metadata(pre, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": []}, "tokens is missing"),
        ({"tokens": "abc"}, "tokens is no list"),
        ({"tokens": ["a", 1]}, "tokens is no list"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "names a token twice"),
        ({"token_type": [1, 1]}, "token_type has 2 entries"),
        ({"token_type": [True]}, "token_type is no list"),
        ({"merges": ["he"]}, "merges"),
        ({"merges": ["h e l"]}, "merges"),
        ({"merges": ["he q"]}, "merges"),
        ({"merges": 5}, "merges is no list"),
        ({"bos_token_id": 10**6}, "bos_token_id is 1000000, but ids run from 0"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'"),
        ({"add_bos_token": 1}, "add_bos_token is 1"),
        ({"add_eos_token": True, "eos_token_id": None}, "eos_token_id is missing"),
        ({"pre": 5}, "pre is 5, not a text"),
        ({"model": ["gpt2"]}, "model is"),
    ],
)
def test_malformed_metadata(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        load_tokenizer(gguf(**changes))
    assert "\n" not in str(caught.value)


JUNK = (
    st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers() | st.text(max_size=2))
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([k[15:] for k in gguf_metadata()][:8]), JUNK, max_size=3))
def test_no_metadata_escapes_as_another_error(changes: dict[str, Any]) -> None:
    try:
        load_tokenizer(gguf(**changes))
    except (ModelFileError, UnsupportedModelError):
        return


class Watched(Mapping[str, Any]):
    """Metadata that remembers which keys were read."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values_of = values
        self.was_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        value = self.values_of[key]
        self.was_read.add(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_of)

    def __len__(self) -> int:
        return len(self.values_of)


def vocabulary_was_read(metadata: Watched) -> bool:
    return "tokenizer.ggml.merges" in metadata.was_read


def assert_same(one: Tokenizer, other: Tokenizer) -> None:
    for name in ("vocab_size", "bos_id", "eos_ids", "special_ids", "named_tokens"):
        assert getattr(one, name) == getattr(other, name)
    text = "<|im_start|>hello w 1213 é<tool>"
    assert one.encode(text) == other.encode(text)


@pytest.mark.parametrize("values", [gguf_metadata("qwen2"), sentencepiece_metadata()])
def test_a_cached_tokenizer_is_the_built_one(tmp_path: Path, values: dict[str, Any]) -> None:
    path = tmp_path / "new" / "tokenizer"
    built = load_gguf_tokenizer(values, path, digest="d")
    metadata = Watched(values)
    assert_same(load_gguf_tokenizer(metadata, path, digest="d"), built)
    assert not vocabulary_was_read(metadata)
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer"]


def test_other_metadata_is_not_answered_from_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer"
    load_gguf_tokenizer(gguf_metadata("smollm"), path)
    other = load_gguf_tokenizer(gguf_metadata("gpt-2"), path)
    assert_same(other, load_tokenizer(gguf_metadata("gpt-2")))
    fewer = gguf_metadata("gpt-2", merges=MERGES[:-1])
    assert_same(load_gguf_tokenizer(fewer, path), load_tokenizer(fewer))


@settings(deadline=None)
@given(st.data())
def test_a_damaged_cache_is_built_anew(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cache") / "tokenizer"
    built = load_gguf_tokenizer(gguf_metadata(), path, digest="d")
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    is_cut = data.draw(st.booleans())
    path.write_bytes(
        whole[:at] if is_cut else whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    )
    metadata = Watched(gguf_metadata())
    assert_same(load_gguf_tokenizer(metadata, path, digest="d"), built)
    assert vocabulary_was_read(metadata)
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_a_note(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path, notes = tmp_path / "file" / "tokenizer", Notes()
    built = load_gguf_tokenizer(gguf_metadata())
    assert_same(load_gguf_tokenizer(gguf_metadata(), path, progress=notes), built)
    [line] = notes.lines
    assert "cannot write to" in line
    assert "TOKENMILL_HOME" in line


def test_names_of_pre_tokenizers_share_rows() -> None:
    assert PRE_TOKENIZERS["llama3"] is PRE_TOKENIZERS["llama-bpe"]

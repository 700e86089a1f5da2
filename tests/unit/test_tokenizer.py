"""Tokenizers from a model's folder, and what every tokenizer does."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import (
    CONTROL,
    NORMAL,
    SPECIAL,
    UNUSED,
    USER_DEFINED,
    base_tokens,
    gguf_metadata,
    qwen_base_backend,
    qwen_like_backend,
    write_folder,
)
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from tokenmill.errors import ModelFileError, UnsupportedModelError, UsageError
from tokenmill.models.text.load import load_tokenizer
from tokenmill.models.text.tokenizer import Tokenizer

NUM_BASE = len(base_tokens())
TOKENIZER = Tokenizer(qwen_like_backend())


def test_vocabulary_is_base_and_added_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path))
    assert tokenizer.vocab_size == NUM_BASE + len(SPECIAL) + 1
    assert tokenizer.special_ids == {NUM_BASE, NUM_BASE + 1, NUM_BASE + 2}
    assert tokenizer.token_to_id("<tool>") == NUM_BASE + 3
    assert tokenizer.token_to_id("<nonsense>") is None


def test_added_tokens_of_the_configuration_join_the_vocabulary(tmp_path: Path) -> None:
    known = {str(NUM_BASE + i): {"content": token} for i, token in enumerate(SPECIAL)}
    new = {str(NUM_BASE + 4): {"content": "<new>", "special": True}}
    tokenizer = load_tokenizer(
        write_folder(tmp_path, tokenizer_config={"added_tokens_decoder": known | new})
    )
    assert tokenizer.vocab_size == NUM_BASE + len(SPECIAL) + 2
    assert tokenizer.encode("<new>") == [NUM_BASE + 4]
    assert NUM_BASE + 4 in tokenizer.special_ids


def test_ends_come_from_generation_config_then_tokenizer_config(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path))
    assert tokenizer.eos_ids == (NUM_BASE + 2, NUM_BASE)
    assert tokenizer.bos_id is None
    assert tokenizer.named_tokens == {"eos_token": "<|im_end|>"}
    (tmp_path / "generation_config.json").unlink()
    assert load_tokenizer(tmp_path).eos_ids == (NUM_BASE + 2,)


def test_a_named_token_may_be_an_object_or_in_the_special_tokens_map(tmp_path: Path) -> None:
    named = {"bos_token": {"content": "<|im_start|>", "lstrip": False}, "eos_token": "<|im_end|>"}
    write_folder(tmp_path, tokenizer_config=named)
    assert load_tokenizer(tmp_path).bos_id == NUM_BASE + 1
    write_folder(tmp_path, tokenizer_config={}, special_tokens_map=named)
    assert load_tokenizer(tmp_path).bos_id == NUM_BASE + 1


def test_limits_of_training_do_not_cut_prompts(tmp_path: Path) -> None:
    backend = qwen_like_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    write_folder(tmp_path)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("x y z" * 10)) == 50


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": {"chat_template": "one"}}, {"default": "one"}),
        (
            {
                "tokenizer_config": {
                    "chat_template": [
                        {"name": "default", "template": "one"},
                        {"name": "tool_use", "template": "two"},
                    ]
                }
            },
            {"default": "one", "tool_use": "two"},
        ),
        (
            {
                "tokenizer_config": {"chat_template": "one"},
                "chat_template": {"chat_template": "other"},
            },
            {"default": "other"},
        ),
        ({"tokenizer_config": {}}, {}),
    ],
)
def test_chat_templates_of_a_folder(
    tmp_path: Path, files: dict[str, Any], expected: dict[str, str]
) -> None:
    assert load_tokenizer(write_folder(tmp_path, **files)).chat_templates == expected


def test_a_template_file_comes_first(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer_config={"chat_template": "one"})
    (tmp_path / "chat_template.jinja").write_text("from the file")
    extra = tmp_path / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool_use.jinja").write_text("with tools")
    templates = load_tokenizer(tmp_path).chat_templates
    assert templates == {"default": "from the file", "tool_use": "with tools"}


def test_special_tokens_in_a_text_become_their_ids() -> None:
    assert TOKENIZER.encode("hello<|im_end|>") == [
        TOKENIZER.token_to_id("hello"),
        TOKENIZER.token_to_id("<|im_end|>"),
    ]


@settings(deadline=None)
@given(st.text())
def test_text_survives_the_round_trip(text: str) -> None:
    decoded = TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=False)
    assert decoded == qwen_like_backend().normalizer.normalize_str(text)  # type: ignore[union-attr]


@settings(deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)), st.booleans())
def test_decoding_agrees_with_the_library(ids: list[int], skip: bool) -> None:
    expected = qwen_like_backend().decode(ids, skip_special_tokens=skip)
    assert TOKENIZER.decode(ids, skip_special_tokens=skip) == expected


def test_bytes_of_a_token() -> None:
    e_acute = TOKENIZER.encode("é")
    assert [TOKENIZER.id_to_bytes(token_id) for token_id in e_acute] == ["é".encode()]
    assert TOKENIZER.id_to_bytes(NUM_BASE + 1) == b"<|im_start|>"
    every_byte = {TOKENIZER.id_to_bytes(token_id) for token_id in range(256)}
    assert every_byte == {bytes([byte]) for byte in range(256)}


def test_an_added_token_stands_for_its_text_even_in_the_byte_alphabet() -> None:
    backend = qwen_like_backend()
    backend.add_tokens(["<é>"])
    tokenizer = Tokenizer(backend)
    assert tokenizer.decode(tokenizer.encode("a<é>b")) == "a<é>b"


@pytest.mark.parametrize("token_id", [-1, TOKENIZER.vocab_size, 2**40])
def test_an_id_outside_the_vocabulary_is_refused(token_id: int) -> None:
    with pytest.raises(UsageError, match=rf"token id {token_id} .* 0 to {NUM_BASE + 3}"):
        TOKENIZER.decode([0, token_id])
    with pytest.raises(UsageError, match="outside the vocabulary"):
        TOKENIZER.id_to_bytes(token_id)


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(UsageError, match="lone surrogate at character 1"):
        TOKENIZER.encode("a\ud800")


def test_a_decoder_that_we_do_not_have_is_named() -> None:
    backend = Backend(models.BPE())
    backend.decoder = decoders.CTC()
    with pytest.raises(UnsupportedModelError, match="CTC"):
        Tokenizer(backend)
    with pytest.raises(UnsupportedModelError, match="decoder is none"):
        Tokenizer(Backend(models.BPE()))


def wordpiece() -> Tokenizer:
    words = ["[UNK]", "[CLS]", "[SEP]", "un", "##believ", "##able", "dog", "cat", "runs"]
    backend = Backend(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[CLS]", "[SEP]"])
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return Tokenizer(backend)


def test_word_pieces_become_words() -> None:
    tokenizer = wordpiece()
    ids = tokenizer.encode("unbelievable dog runs")
    assert ids == [1, 3, 4, 5, 6, 8, 2]
    assert tokenizer.decode(ids) == "unbelievable dog runs"
    assert tokenizer.id_to_bytes(4) == b"believ"


def test_one_text_or_two_within_a_length() -> None:
    tokenizer = wordpiece()
    assert tokenizer.encode_pair("dog runs") == ([1, 6, 8, 2], None)
    assert tokenizer.encode_pair("dog runs", "cat") == ([1, 6, 8, 2, 7, 2], 4)
    assert tokenizer.encode_pair("dog runs", longest=3) == ([1, 6, 2], None)
    assert tokenizer.encode_pair("dog runs", add_special_tokens=False, longest=1) == ([6], None)
    long = "dog dog dog dog dog"
    assert tokenizer.encode_pair(long, "cat", longest=7) == ([1, 6, 6, 6, 2, 7, 2], 5)
    assert tokenizer.encode_pair("cat", long, longest=7) == ([1, 7, 2, 6, 6, 6, 2], 3)
    assert tokenizer.encode_pair(long, long, longest=7) == ([1, 6, 6, 2, 6, 6, 2], 4)
    with pytest.raises(UsageError, match="2 tokens leave no room beside 2"):
        tokenizer.encode_pair("dog", longest=2)


def test_roles_must_be_in_the_vocabulary() -> None:
    with pytest.raises(ModelFileError, match="names 9999"):
        Tokenizer(qwen_like_backend(), eos_ids=[9999])


def test_a_folder_without_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=r"has tokenizer\.model but no"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "null", "[]", '{"model": {}}', "[" * 100_000])
def test_damaged_json_is_one_readable_error(tmp_path: Path, content: str) -> None:
    write_folder(tmp_path)
    for name in ("tokenizer_config.json", "generation_config.json", "tokenizer.json"):
        whole = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content)
        if name == "tokenizer.json" or content != '{"model": {}}':
            with pytest.raises(ModelFileError, match=name) as caught:
                load_tokenizer(tmp_path)
            assert "\n" not in str(caught.value)
        (tmp_path / name).write_text(whole)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": "<gone>"}}, "eos_token is '<gone>'"),
        ({"generation_config": {"eos_token_id": "2"}}, "eos_token_id is '2'"),
        ({"generation_config": {"eos_token_id": [10**6]}}, "names 1000000"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "malformed"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "y"}}}}, "malformed"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9": {"content": "<y>"}}}}, "has id 9"),
    ],
)
def test_contradictions_in_a_folder(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        load_tokenizer(write_folder(tmp_path, **files))


def test_files_that_are_not_text(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelFileError, match=r"chat_template\.jinja: is not UTF-8"):
        load_tokenizer(tmp_path)


@settings(deadline=None)
@given(st.binary(max_size=40), st.data())
def test_a_damaged_tokenizer_json_never_escapes(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, data: st.DataObject
) -> None:
    folder = write_folder(tmp_path_factory.mktemp("model"))
    whole = (folder / "tokenizer.json").read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    (folder / "tokenizer.json").write_bytes(whole[:at] + noise + whole[at + len(noise) :])
    try:
        load_tokenizer(folder)
    except (ModelFileError, UnsupportedModelError):
        return


# Qwen2.5 has 151,643 entries of byte-level BPE, then 22 that are added; the first 14 are special.
QWEN_ADDED = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
QWEN_NUM_SPECIAL = 14


def qwen_folder(folder: Path) -> Tokenizer:
    backend = qwen_base_backend()
    for number, token in enumerate(QWEN_ADDED):
        is_special = number < QWEN_NUM_SPECIAL
        backend.add_tokens([AddedToken(token, special=is_special, normalized=False)])
    write_folder(folder)
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def qwen_gguf() -> Tokenizer:
    """As llama.cpp's converter writes it: padded to the rows of the embedding."""
    size, num_padding = NUM_BASE + len(QWEN_ADDED), 271
    control, defined = QWEN_NUM_SPECIAL, len(QWEN_ADDED) - QWEN_NUM_SPECIAL
    padding = [f"[PAD{size + number}]" for number in range(num_padding)]
    kinds = [NORMAL] * NUM_BASE + [CONTROL] * control + [USER_DEFINED] * defined
    return load_tokenizer(
        gguf_metadata(
            "qwen2",
            tokens=[*base_tokens(), *QWEN_ADDED, *padding],
            token_type=kinds + [UNUSED] * num_padding,
            bos_token_id=NUM_BASE,
            eos_token_id=NUM_BASE + 2,
        )
    )


def test_a_vocabulary_as_qwens_has_all_added_entries_and_no_padding(tmp_path: Path) -> None:
    first, after = NUM_BASE, NUM_BASE + len(QWEN_ADDED)
    for tokenizer in (qwen_folder(tmp_path), qwen_gguf()):
        assert tokenizer.vocab_size == after
        assert tokenizer.encode("".join(QWEN_ADDED)) == list(range(first, after))
        assert tokenizer.special_ids == set(range(first, first + QWEN_NUM_SPECIAL))
        assert tokenizer.decode(range(first, after)) == "".join(QWEN_ADDED[QWEN_NUM_SPECIAL:])
        with pytest.raises(UsageError, match=f"token id {after} "):
            tokenizer.decode([after])


@pytest.mark.parametrize("unit", ["Hello, world <|im_end|>", "\u0065\u0301\n", "1 2\t"])
def test_a_long_text_is_encoded_as_a_short_one_is(unit: str) -> None:
    text = (unit * 5000)[:50_000]
    expected = TOKENIZER._backend.encode(text).ids
    assert TOKENIZER.encode(text) == expected


@given(st.text(max_size=60))
def test_no_text_of_few_tokens_is_longer_than_said(text: str) -> None:
    assert len(text) <= TOKENIZER.max_chars(len(TOKENIZER.encode(text)))

"""Incremental detokenization: no half characters, and the same text as decoding at once."""

from itertools import chain

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import gguf_metadata, qwen_like_backend, sentencepiece_metadata

from tokenmill.errors import UsageError
from tokenmill.models.text.detokenizer import Detokenizer
from tokenmill.models.text.load import load_tokenizer
from tokenmill.models.text.tokenizer import Tokenizer

TOKENIZERS = {
    "byte-level": Tokenizer(qwen_like_backend()),
    "gguf": load_tokenizer(gguf_metadata()),
    "sentencepiece": load_tokenizer(sentencepiece_metadata()),
}
HARD_TEXTS = (
    st.text(st.sampled_from("ab é\u0301\u200d\ufe0f漢字👩‍👩‍👧🇩🇪\u0000\U0010ffff ▁\n")) | st.text()
)


def pieces(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    decoder = Detokenizer(tokenizer, skip)
    return [*(decoder.push([token_id]) for token_id in ids), decoder.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(text=HARD_TEXTS)
@example(text="👩‍👩‍👧 e\u0301 漢")
def test_pieces_join_to_the_text_without_half_characters(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    found = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(found) == tokenizer.decode(tokenizer.encode(text))
    assert "".join(found).count("\ufffd") == text.count("\ufffd")
    assert found[-1] == ""


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_any_ids_in_any_portions_give_the_full_decode(
    name: str, data: st.DataObject, skip: bool
) -> None:
    tokenizer = TOKENIZERS[name]
    ids = st.integers(0, tokenizer.vocab_size - 1)
    portions = data.draw(st.lists(st.lists(ids)))
    decoder = Detokenizer(tokenizer, skip)
    text = "".join([*map(decoder.push, portions), decoder.finish()])
    assert text == tokenizer.decode(list(chain(*portions)), skip_special_tokens=skip)


def test_a_character_appears_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["gguf"]
    assert pieces(tokenizer, tokenizer.encode("a👍b")) == ["a", "", "", "", "👍", "b", ""]


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    tokenizer = TOKENIZERS["gguf"]
    decoder = Detokenizer(tokenizer)
    assert decoder.push(tokenizer.encode("👍")[:3]) == ""
    assert decoder.finish() == "\ufffd"


def test_an_invalid_byte_is_replaced_as_soon_as_it_is_known() -> None:
    tokenizer = TOKENIZERS["gguf"]
    lead, letter = tokenizer.encode("👍")[0], tokenizer.encode("x")[0]
    assert pieces(tokenizer, [lead, letter]) == ["", "\ufffdx", ""]


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = TOKENIZERS["gguf"]
    ids = tokenizer.encode("a<|im_end|><tool>")
    assert "".join(pieces(tokenizer, ids)) == "a<tool>"
    assert "".join(pieces(tokenizer, ids, skip=False)) == "a<|im_end|><tool>"


def test_a_continuation_keeps_the_space_that_begins_it() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer.encode("hi", add_special_tokens=False)
    assert Detokenizer(tokenizer).push(ids) == "hi"
    assert Detokenizer(tokenizer, is_continuation=True).push(ids) == " hi"


def test_a_refused_id_consumes_nothing() -> None:
    tokenizer = TOKENIZERS["gguf"]
    decoder = Detokenizer(tokenizer)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        decoder.push([*tokenizer.encode("a"), tokenizer.vocab_size])
    assert decoder.push(tokenizer.encode("b")) == "b"

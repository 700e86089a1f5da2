"""The two kinds of tokenizer that GGUF files of encoders hold, rebuilt for `tokenizers`.

WordPiece (BERT) takes the longest token that begins what is left of a word. Unigram (XLM-R) takes
the tokens whose scores add up to the most. Both put tokens around one text, or around two.
"""

import re
from typing import TYPE_CHECKING

from tokenmill.errors import ModelFileError
from tokenmill.models.gguf.vocabulary import (
    KEYS,
    Metadata,
    TokenType,
    Vocabulary,
    check_len,
    read_flag,
    read_list,
    read_token_id,
)

if TYPE_CHECKING:
    import tokenizers

_SPACE_MARK = "\u2581"
_GOES_ON = "##"
_ROLE = re.compile(r"\[.+\]")  # [CLS], [SEP] and the like, which older files do not mark


def wordpiece_backend(metadata: Metadata, vocabulary: Vocabulary) -> "tokenizers.Tokenizer":
    """WordPiece (`tokenizer.ggml.model` is "bert").

    Files do not say whether case matters: it does where a token has a capital letter.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    rows = zip(vocabulary.tokens, vocabulary.types, strict=True)
    words = [_as_bert_writes(token, kind) for token, kind in rows]
    if len(set(words)) != len(words):
        raise ModelFileError(f"{KEYS}tokens names a word twice; fetch the file again")
    unknown_id = read_token_id(metadata, "unknown_token_id", len(words))
    unknown = "[UNK]" if unknown_id is None else words[unknown_id]
    ids = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordPiece(ids, unk_token=unknown, max_input_chars_per_word=100))
    is_cased = any(w != w.lower() for w in words if not _ROLE.fullmatch(w))
    backend.normalizer = normalizers.BertNormalizer(lowercase=not is_cased)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix=_GOES_ON)
    first = _role(metadata, ids, ("cls", "bos"), "[CLS]")
    last = _role(metadata, ids, ("seperator", "separator", "eos"), "[SEP]")
    _put_around(backend, first, last, "{0}:0 $A:0 {1}:0", " $B:1 {1}:1")
    return backend


def _as_bert_writes(token: str, kind: int) -> str:
    """llama.cpp marks tokens that begin a word, BERT those that go on with one."""
    if kind == TokenType.CONTROL or _ROLE.fullmatch(token):
        return token
    if token.startswith(_SPACE_MARK):
        return token[1:]
    return _GOES_ON + token


def unigram_backend(metadata: Metadata, vocabulary: Vocabulary) -> "tokenizers.Tokenizer":
    """SentencePiece Unigram (`tokenizer.ggml.model` is "t5", though it is XLM-R's)."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    scores = read_list(metadata, "scores", float)
    check_len("scores", scores, vocabulary.num_listed)
    tokens = vocabulary.tokens
    unknown_id = read_token_id(metadata, "unknown_token_id", len(tokens))
    if unknown_id is None:
        raise ModelFileError(f"{KEYS}unknown_token_id is missing; fetch the file again")
    pairs = list(zip(tokens, scores[: len(tokens)], strict=True))
    backend = Tokenizer(models.Unigram(pairs, unk_id=unknown_id, byte_fallback=False))
    steps: list[normalizers.Normalizer] = []
    if charsmap := read_list(metadata, "precompiled_charsmap", int):
        steps.append(_precompiled(charsmap))
    if read_flag(metadata, "remove_extra_whitespaces", default=True):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    backend.normalizer = normalizers.Sequence(steps)
    scheme = "always" if read_flag(metadata, "add_space_prefix", default=True) else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE_MARK, prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(_SPACE_MARK, prepend_scheme=scheme)
    ids = {token: i for i, token in enumerate(tokens)}
    first = _role(metadata, ids, ("cls", "bos"), "<s>")
    last = _role(metadata, ids, ("seperator", "separator", "eos"), "</s>")
    _put_around(backend, first, last, "{0}:0 $A:0 {1}:0", " {1}:0 $B:0 {1}:0")
    return backend


def _precompiled(charsmap: list[int]) -> "tokenizers.normalizers.Normalizer":
    """SentencePiece's own table of what characters are replaced by."""
    from tokenizers import normalizers

    try:
        return normalizers.Precompiled(bytes(value & 0xFF for value in charsmap))
    except Exception as error:  # the library raises nothing narrower
        raise ModelFileError(
            f"{KEYS}precompiled_charsmap: {error}; fetch the file again"
        ) from error


def _role(
    metadata: Metadata, ids: dict[str, int], keys: tuple[str, ...], name: str
) -> tuple[str, int]:
    """The token of a role: what the first of the keys says, or else the one of that name."""
    found = (read_token_id(metadata, f"{key}_token_id", len(ids)) for key in keys)
    token_id = next((i for i in found if i is not None), ids.get(name))
    if token_id is None:
        raise ModelFileError(f"{KEYS}{keys[0]}_token_id is missing, and so is {name}")
    return list(ids)[token_id], token_id


def _put_around(
    backend: "tokenizers.Tokenizer",
    first: tuple[str, int],
    last: tuple[str, int],
    single: str,
    second: str,
) -> None:
    """Let tokens stand around a text, and around the second of two."""
    from tokenizers.processors import TemplateProcessing

    names = (first[0], last[0])
    one = single.format(*names)
    backend.post_processor = TemplateProcessing(
        single=one.split(), pair=(one + second.format(*names)).split(), special_tokens=[first, last]
    )

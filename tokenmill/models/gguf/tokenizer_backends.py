"""The two kinds of tokenizer that GGUF files hold, rebuilt for the `tokenizers` library.

Byte-level BPE lists its merges, and names a pre-tokenizer (its patterns: text/pretokenizers.py).
SentencePiece BPE gives each token a score, and merges whatever makes the token of highest score;
the merges that this amounts to are worked out here, as Hugging Face's converters do.
"""

from typing import TYPE_CHECKING, Any

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
from tokenmill.models.text.pretokenizers import PreTokenizer

if TYPE_CHECKING:
    import tokenizers

_SPACE_MARK = "\u2581"


def byte_level_backend(
    metadata: Metadata, vocabulary: Vocabulary, pre: PreTokenizer
) -> "tokenizers.Tokenizer":
    """Byte-level BPE (`tokenizer.ggml.model` is "gpt2")."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    halves = (merge.partition(" ") for merge in read_list(metadata, "merges", str))
    merges = [(left, right) for left, _, right in halves]
    backend = Tokenizer(_merge_model(vocabulary, merges, ignore_merges=pre.ignore_merges))
    if pre.has_nfc:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, spelled])
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece_backend(metadata: Metadata, vocabulary: Vocabulary) -> "tokenizers.Tokenizer":
    """SentencePiece BPE with byte fallback (`tokenizer.ggml.model` is "llama")."""
    from tokenizers import Tokenizer, decoders, normalizers

    scores = read_list(metadata, "scores", float)
    check_len("scores", scores, vocabulary.num_listed)
    unknown_id = read_token_id(metadata, "unknown_token_id", len(vocabulary.tokens))
    unknown = None if unknown_id is None else vocabulary.tokens[unknown_id]
    merges = _merges_by_score(vocabulary, scores)
    backend = Tokenizer(
        _merge_model(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    has_prefix = read_flag(metadata, "add_space_prefix", default=True)
    prepend = [normalizers.Prepend(_SPACE_MARK)] if has_prefix else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE_MARK)])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    backend.decoder = decoders.Sequence(
        [
            *(decoders.Replace(_SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()),
            *strip,
        ]
    )
    return backend


def _merges_by_score(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others: highest score first, then lowest ids."""
    rows = zip(vocabulary.tokens, vocabulary.types, strict=True)
    ids = {token: i for i, (token, kind) in enumerate(rows) if kind == TokenType.NORMAL}
    ranked = sorted(
        (-scores[token_id], token_id, ids[token[:cut]], ids[token[cut:]])
        for token, token_id in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    )
    tokens = vocabulary.tokens
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]


def _merge_model(
    vocabulary: Vocabulary, merges: list[tuple[str, str]], **options: Any
) -> "tokenizers.models.BPE":
    from tokenizers.models import BPE

    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    try:
        return BPE(ids, merges, **options)
    except Exception as error:  # the library raises nothing narrower
        raise ModelFileError(f"{KEYS}merges: {error}; fetch the file again") from error

"""The tokenizer of a GGUF file: built from its metadata, kept on disk, and its tokens' roles."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tokenmill.errors import CapacityError, ModelFileError, UnsupportedModelError, UsageError
from tokenmill.models.gguf.encoder_backends import unigram_backend, wordpiece_backend
from tokenmill.models.gguf.tokenizer_backends import byte_level_backend, sentencepiece_backend
from tokenmill.models.gguf.vocabulary import (
    KEYS,
    Metadata,
    TokenType,
    Vocabulary,
    read_flag,
    read_text,
    read_token_id,
    read_vocabulary,
)
from tokenmill.models.progress import Progress, SilentProgress
from tokenmill.models.text.pretokenizers import find_pre_tokenizer
from tokenmill.models.text.tokenizer import Tokenizer
from tokenmill.models.text.tokenizer_cache import read_cached_backend, write_cached_backend

if TYPE_CHECKING:
    import tokenizers

# Files name one end token; chat models stop at any of these (generation_config.json lists them,
# which does not travel in a GGUF file).
_END_TOKENS = (
    *("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|end|>", "<end_of_turn>", "</s>"),
)
_OF_ENCODERS = {"bert": wordpiece_backend, "t5": unigram_backend}


def load_gguf_tokenizer(
    metadata: Metadata,
    cache_path: Path | None = None,
    *,
    digest: str | None = None,
    progress: Progress | None = None,
) -> Tokenizer:
    """The tokenizer of a GGUF file; `metadata` holds its `tokenizer.*` values.

    `cache_path` is a file where the built tokenizer is kept; it is used only while its checksum
    and that of the metadata hold, and is written anew otherwise. `digest` is a checksum of the
    metadata that the caller has at hand: with it, a cached tokenizer loads without reading the
    vocabulary from `metadata`. A place that cannot be written costs a note to `progress` and the
    speed of the next start. Raises ModelFileError for malformed metadata,
    UnsupportedModelError for a tokenizer model or pre-tokenizer that we do not have.
    """
    if cache_path is None:
        return _with_roles(build_backend(metadata), metadata)
    digest = digest or metadata_digest(metadata)
    backend = read_cached_backend(cache_path, digest)
    if backend is None:
        backend = build_backend(metadata)
        try:
            write_cached_backend(cache_path, digest, backend)
        except (CapacityError, UsageError) as error:
            (progress or SilentProgress()).note(f"{error}; every start builds the tokenizer anew")
    return _with_roles(backend, metadata)


def metadata_digest(metadata: Metadata) -> str:
    """SHA-256 over everything that the tokenizer depends on."""
    digest = hashlib.sha256()
    for key in sorted(key for key in metadata if key.startswith("tokenizer.")):
        digest.update(f"{key}={metadata[key]!r}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


def build_backend(metadata: Metadata) -> "tokenizers.Tokenizer":
    """The tokenizer alone, without the roles that its tokens play."""
    vocabulary = read_vocabulary(metadata)
    model = read_text(metadata, "model")
    if model in _OF_ENCODERS:
        backend = _OF_ENCODERS[model](metadata, vocabulary)
        _add_tokens(backend, vocabulary)
        return backend
    if model == "gpt2":
        pre = find_pre_tokenizer(read_text(metadata, "pre") or "default")
        backend = byte_level_backend(metadata, vocabulary, pre)
        adds_bos = pre.add_bos
    elif model == "llama":
        backend = sentencepiece_backend(metadata, vocabulary)
        adds_bos = True
    else:
        raise UnsupportedModelError(
            f"tokenizer model {model!r} (tokenizer.ggml.model) is not supported; supported are "
            "'gpt2' (byte-level BPE), 'llama' (SentencePiece BPE), 'bert' (WordPiece) and 't5' "
            "(SentencePiece Unigram)"
        )
    _add_tokens(backend, vocabulary)
    _add_sequence_ends(backend, metadata, vocabulary, adds_bos=adds_bos)
    return backend


def _add_tokens(backend: "tokenizers.Tokenizer", vocabulary: Vocabulary) -> None:
    """Mark the tokens that are found in text as they stand, before any merging."""
    from tokenizers import AddedToken

    special = {TokenType.CONTROL, TokenType.UNKNOWN}
    backend.add_tokens(
        [
            AddedToken(token, special=kind in special, normalized=False)
            for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if kind in special or kind == TokenType.USER_DEFINED
        ]
    )


def _add_sequence_ends(
    backend: "tokenizers.Tokenizer", metadata: Metadata, vocabulary: Vocabulary, *, adds_bos: bool
) -> None:
    """What `add_special_tokens` puts before and after a text."""
    from tokenizers.processors import TemplateProcessing

    ends = {}
    for name, is_added in (
        ("bos", read_flag(metadata, "add_bos_token", default=adds_bos)),
        ("eos", read_flag(metadata, "add_eos_token", default=False)),
    ):
        if is_added:
            token_id = read_token_id(metadata, f"{name}_token_id", len(vocabulary.tokens))
            if token_id is None:
                raise ModelFileError(f"{KEYS}{name}_token_id is missing, but has to be added")
            ends[name] = token_id
    if ends:
        backend.post_processor = TemplateProcessing(
            single=[name for name in ("bos", "$A", "eos") if name in ends or name == "$A"],
            special_tokens=list(ends.items()),
        )


def _with_roles(backend: "tokenizers.Tokenizer", metadata: Metadata) -> Tokenizer:
    size = backend.get_vocab_size()
    bos_id = read_token_id(metadata, "bos_token_id", size)
    named_ends = (read_token_id(metadata, f"{end}_token_id", size) for end in ("eos", "eot", "eom"))
    ends = [token_id for token_id in named_ends if token_id is not None]
    names = {
        f"{role}_token": backend.id_to_token(token_id)
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (token_id := read_token_id(metadata, f"{key}_token_id", size)) is not None
    }
    return Tokenizer(
        backend,
        bos_id=bos_id,
        eos_ids=[*ends, *_known_ends(backend)],
        chat_templates=dict(_templates(metadata)),
        named_tokens={name: text for name, text in names.items() if text is not None},
    )


def _known_ends(backend: "tokenizers.Tokenizer") -> Iterator[int]:
    added = backend.get_added_tokens_decoder()
    for token in _END_TOKENS:
        token_id = backend.token_to_id(token)
        if token_id in added and added[token_id].special:
            yield token_id


def _templates(metadata: Metadata) -> Iterator[tuple[str, str]]:
    base = "tokenizer.chat_template"
    for key in metadata:
        if key == base or key.startswith(f"{base}."):
            source = metadata[key]
            if not isinstance(source, str):
                raise ModelFileError(f"{key} is {source!r}, not a text")
            yield key.removeprefix(base).removeprefix(".") or "default", source

"""Text to token ids and back.

The `tokenizers` library encodes; ids become text through the bytes of each token, so that a
stream of them never has to be decoded twice (see detokenizer.py).
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from tokenmill.errors import ModelFileError, UsageError
from tokenmill.models.text.token_bytes import spelling_of

if TYPE_CHECKING:
    import tokenizers

_LONG_CHARS = 4096
"""A longer text is encoded without the interpreter's lock, which a short one does not repay."""

_COMPOSED_CHARS = 4
"""Characters that Unicode normalisation makes one of, at most."""


class Tokenizer:
    """The tokenizer of one model.

    Ids run from 0 to `vocab_size - 1`; a model may pad its own vocabulary beyond that, with ids
    that mean nothing. `bos_id` begins a sequence (None: the model has none), each of `eos_ids`
    ends an answer. `chat_templates` holds Jinja sources by name ("default", "tool_use"), and
    `named_tokens` the texts they refer to by name ("bos_token", "eos_token").
    Raises ModelFileError where an id given is not in the vocabulary.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        chat_templates: Mapping[str, str] | None = None,
        named_tokens: Mapping[str, str] | None = None,
    ) -> None:
        # A tokenizer.json may carry the limits of its training, which would cut prompts silently.
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._spelling = spelling_of(backend)
        self._bytes = {i: self._spelling.added_bytes(token.content) for i, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        num_base = backend.get_vocab_size(with_added_tokens=False)
        self.vocab_size = max(num_base, 1 + max(added, default=-1))
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.chat_templates = dict(chat_templates or {})
        self.named_tokens = dict(named_tokens or {})
        for token_id in (*self.eos_ids, *(() if bos_id is None else (bos_id,))):
            if not 0 <= token_id < self.vocab_size:
                raise ModelFileError(
                    f"the tokenizer names {token_id} as a special token, but has only "
                    f"{self.vocab_size} tokens; fetch the model again"
                )

    @cached_property
    def _longest_token(self) -> int:
        """Characters of the longest token, as the vocabulary spells it: never fewer than it has."""
        return max(map(len, self._backend.get_vocab()), default=1)

    @property
    def drops_first_space(self) -> bool:
        """Whether decoding takes away one space that begins the text (SentencePiece)."""
        return self._spelling.drops_first_space

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens that are written out in it become their ids.

        `add_special_tokens` adds what the model wants around a sequence (often only `bos_id`).
        Raises UsageError for text that is no valid Unicode.
        """
        _check_unicode(text)
        if len(text) > _LONG_CHARS:
            [encoded] = self._backend.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
            return encoded.ids
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_pair(
        self,
        first: str,
        second: str | None = None,
        *,
        longest: int | None = None,
        add_special_tokens: bool = True,
    ) -> tuple[list[int], int | None]:
        """Token ids of one text or of two together, and where the second segment begins, if any.

        What is more than `longest` tokens is cut from the end of the longer text; the tokens around
        the texts stay. Raises UsageError for text that is no valid Unicode, and where `longest`
        leaves nothing.
        """
        texts = [text for text in (first, second) if text is not None]
        parts = [self._encoded(text) for text in texts]
        around = self._backend.num_special_tokens_to_add(len(parts) == 2) * add_special_tokens
        if longest is not None:
            if longest <= around:
                raise UsageError(f"{longest} tokens leave no room beside {around} around the text")
            for part, length in zip(
                parts, _shares([len(p.ids) for p in parts], longest - around), strict=True
            ):
                part.truncate(length)
        whole = self._backend.post_process(
            parts[0], parts[1] if len(parts) == 2 else None, add_special_tokens
        )
        return whole.ids, next((i for i, kind in enumerate(whole.type_ids) if kind), None)

    def max_chars(self, num_tokens: int) -> int:
        """Characters of the longest text that could be so few tokens: more are more tokens."""
        each = self._longest_token * (1 if self._backend.normalizer is None else _COMPOSED_CHARS)
        return num_tokens * each

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that form no character become U+FFFD.

        Raises UsageError for an id outside the vocabulary.
        """
        data = b"".join(self.pieces(ids, skip_special_tokens))
        if self.drops_first_space:
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    def pieces(self, ids: Iterable[int], skip_special_tokens: bool = True) -> list[bytes]:
        """The bytes of each token, without the special ones if these are skipped."""
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        return [self.id_to_bytes(token_id) for token_id in ids if token_id not in skipped]

    def id_to_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; a special token's are those of its name.

        Raises UsageError for an id outside the vocabulary.
        """
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._read_bytes(token_id)
        return known

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, or None."""
        return self._backend.token_to_id(token)

    def to_json(self) -> str:
        """The tokenizer as tokenizer.json has it, tokens added from elsewhere included."""
        text: str = self._backend.to_str()
        return text

    def _encoded(self, text: str) -> "tokenizers.Encoding":
        """Without special tokens around it."""
        _check_unicode(text)
        if len(text) > _LONG_CHARS:
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0]
        return self._backend.encode(text, add_special_tokens=False)

    def _read_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise UsageError(
                f"token id {token_id} is outside the vocabulary: ids run from 0 to "
                f"{self.vocab_size - 1}"
            )
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._spelling.vocabulary_bytes(token)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text has a lone surrogate at character {error.start}: it is no valid Unicode"
        ) from None


def _shares(lengths: list[int], total: int) -> list[int]:
    """What is left of each if tokens are taken from the longer one until all fit."""
    if sum(lengths) <= total:
        return lengths
    if len(lengths) == 1:
        return [total]
    shorter = min(*lengths, total // 2)
    return [min(length, max(shorter, total - shorter)) for length in lengths]

"""What made-up prompts are made of: token ids, or words of one token each."""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenmill.errors import UsageError
from tokenmill.models.text.load import load_tokenizer
from tokenmill.models.text.tokenizer import Tokenizer

ORDINARY_IDS = range(1_000, 10_000)
"""Ids that stand for ordinary tokens in all vocabularies in use: special tokens and single bytes
come first or last."""
_WORD = re.compile(rb" [a-z]{2,}")
_MAX_WORDS = 4096
_LEAST_WORDS = 64


@dataclass(frozen=True)
class Vocabulary:
    """Units of one token each. With `words`, a prompt is text; without, a list of token ids."""

    token_ids: Sequence[int]
    words: Sequence[str] | None = None
    drops_first_space: bool = False  # the tokenizer puts one back

    def draw(self, rng: random.Random, length: int) -> list[int]:
        """Indices of `length` units at random."""
        return rng.choices(range(len(self.token_ids)), k=length)

    def prompt(self, indices: Iterable[int]) -> str | list[int]:
        """The prompt of these units: as many tokens as there are indices."""
        if self.words is None:
            return [self.token_ids[index] for index in indices]
        text = "".join(self.words[index] for index in indices)
        return text.removeprefix(" ") if self.drops_first_space else text


ID_VOCABULARY = Vocabulary(ORDINARY_IDS)


def word_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Words that begin with a space and are one token, wherever they stand.

    Raises UsageError for a tokenizer that has hardly any.
    """
    ids, words = [], []
    for token_id in range(tokenizer.vocab_size):
        piece = tokenizer.id_to_bytes(token_id)
        if not _WORD.fullmatch(piece) or token_id in tokenizer.special_ids:
            continue
        word = piece.decode()
        if tokenizer.encode(f"a{word}{word}", add_special_tokens=False)[1:] == [token_id] * 2:
            ids.append(token_id)
            words.append(word)
        if len(ids) == _MAX_WORDS:
            break
    if len(ids) < _LEAST_WORDS:
        raise UsageError("the tokenizer has too few whole words to make prompts of")
    return Vocabulary(ids, words, tokenizer.drops_first_space)


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model: alias, hf:org/repo, a folder or a .gguf file.

    A folder needs no more than tokenizer.json. Raises the TokenmillError that says what is wrong.
    """
    folder = Path(name)
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    from tokenmill.models.checkpoint import open_checkpoint
    from tokenmill.models.sources import fetch

    checkpoint = open_checkpoint(fetch(name).path)
    return load_tokenizer(checkpoint.tokenizer_metadata or checkpoint.path)

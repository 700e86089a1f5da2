"""The vocabulary in the metadata of a GGUF file, every value checked as it is read.

Keys: github.com/ggml-org/ggml, docs/gguf.md.
"""

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from tokenmill.errors import ModelFileError

T = TypeVar("T")
Metadata = Mapping[str, object]

KEYS = "tokenizer.ggml."


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokens and their types by id, without the padding that follows the last real token.

    `num_listed` counts the padding too, as the file does.
    """

    tokens: list[str]
    types: list[int]
    num_listed: int


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """Raises ModelFileError where tokens are missing or double, or have too many types."""
    tokens = read_list(metadata, "tokens", str)
    types = read_list(metadata, "token_type", int) or [TokenType.NORMAL] * len(tokens)
    if not tokens:
        raise ModelFileError(f"{KEYS}tokens is missing; fetch the file again")
    check_len("token_type", types, len(tokens))
    count = len(tokens)
    # A converter pads the vocabulary to the size of the model's embedding.
    while (
        count and types[count - 1] == TokenType.UNUSED and tokens[count - 1] == f"[PAD{count - 1}]"
    ):
        count -= 1
    if len(set(tokens[:count])) != count:
        raise ModelFileError(f"{KEYS}tokens names a token twice; fetch the file again")
    return Vocabulary(tokens=tokens[:count], types=types[:count], num_listed=len(tokens))


def check_len(key: str, values: Sized, num_tokens: int) -> None:
    """Raise ModelFileError unless there is one value a token."""
    if len(values) != num_tokens:
        raise ModelFileError(
            f"{KEYS}{key} has {len(values)} entries for {num_tokens} tokens; fetch the file again"
        )


def read_text(metadata: Metadata, key: str) -> str | None:
    value = metadata.get(KEYS + key)
    if value is not None and not isinstance(value, str):
        raise ModelFileError(f"{KEYS}{key} is {value!r}, not a text")
    return value


def read_flag(metadata: Metadata, key: str, *, default: bool) -> bool:
    value = metadata.get(KEYS + key, default)
    if not isinstance(value, bool):
        raise ModelFileError(f"{KEYS}{key} is {value!r}, not true or false")
    return value


def read_list(metadata: Metadata, key: str, kind: type[T]) -> list[T]:
    value = metadata.get(KEYS + key, [])
    if not isinstance(value, list) or set(map(type, value)) - {kind}:
        raise ModelFileError(f"{KEYS}{key} is no list of {kind.__name__}; fetch the file again")
    return value


def read_token_id(metadata: Metadata, key: str, num_tokens: int) -> int | None:
    value = metadata.get(KEYS + key)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < num_tokens:
        raise ModelFileError(
            f"{KEYS}{key} is {value!r}, but ids run from 0 to {num_tokens - 1}; "
            "fetch the file again"
        )
    return value

"""The bytes that a token stands for.

A tokenizer spells its tokens in one of three ways: byte-level ones write every byte as one
printable character (GPT-2), SentencePiece ones write text as it is, a space as U+2581 and a byte
that no token covers as `<0x0A>`; WordPiece ones drop the spaces between words and mark what goes on
with a word (`##`). Bytes are the common ground: text is their UTF-8 decoding.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tokenmill.errors import UnsupportedModelError

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"


def _byte_alphabet() -> dict[str, int]:
    """Byte of each character: printable Latin-1 stands for itself, the others follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR: Mapping[str, int] = _byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; text outside the alphabet stands for itself."""
    try:
        return bytes(map(BYTE_OF_CHAR.__getitem__, token))
    except KeyError:
        return token.encode()


def sentencepiece_bytes(token: str) -> bytes:
    """The bytes of a SentencePiece token."""
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(_SPACE_MARK, " ").encode()


def wordpiece_bytes(token: str, prefix: str) -> bytes:
    """The bytes of a WordPiece token; one that begins a word has a space before it."""
    begins = not token.startswith(prefix)
    return (f" {token}" if begins else token.removeprefix(prefix)).encode()


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How the tokens of a vocabulary, and those added to it, become bytes.

    `drops_first_space`: encoding puts a space before the text, and decoding takes it away.
    """

    vocabulary_bytes: Callable[[str], bytes]
    added_bytes: Callable[[str], bytes]
    drops_first_space: bool = False


def spelling_of(backend: "tokenizers.Tokenizer") -> Spelling:
    """The spelling that a tokenizer's decoder undoes.

    Raises UnsupportedModelError for a decoder of another kind.
    """
    steps = _decoder_steps(backend)
    kinds = {str(step["type"]) for step in steps}
    if "ByteLevel" in kinds:
        return Spelling(vocabulary_bytes=byte_level_bytes, added_bytes=str.encode)
    if kinds & {"ByteFallback", "Metaspace"}:
        return Spelling(
            vocabulary_bytes=sentencepiece_bytes,
            added_bytes=sentencepiece_bytes,
            drops_first_space=any(map(_drops_first_space, steps)),
        )
    if "WordPiece" in kinds:
        [step] = [step for step in steps if step["type"] == "WordPiece"]
        spelled = partial(wordpiece_bytes, prefix=str(step.get("prefix", "##")))
        return Spelling(vocabulary_bytes=spelled, added_bytes=spelled, drops_first_space=True)
    found = ", ".join(sorted(kinds)) or "none"
    raise UnsupportedModelError(
        f"the tokenizer's decoder is {found}; supported are ByteLevel, ByteFallback, Metaspace "
        "and WordPiece"
    )


def _decoder_steps(backend: "tokenizers.Tokenizer") -> list[dict[str, object]]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, object]] = state["decoders"] if state["type"] == "Sequence" else [state]
    return steps


def _drops_first_space(step: Mapping[str, object]) -> bool:
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never"
    return step["type"] == "Strip" and step.get("content") == " " and step.get("start") == 1

"""Log probabilities in the shapes of the two OpenAI interfaces, and in vLLM's for prompts.

An entry of the engine's is {token id: Logprob}: the token itself first, then the most likely.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tokenmill.engine.outputs import TokenLogprobs
from tokenmill.models.text.tokenizer import Tokenizer

_LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


class TokenTexts(Protocol):
    """What is needed of a tokenizer."""

    def id_to_bytes(self, token_id: int) -> bytes: ...


def token_text(tokenizer: TokenTexts, token_id: int) -> str:
    """A token's text alone; U+FFFD for bytes that are part of a character."""
    return tokenizer.id_to_bytes(token_id).decode(errors="replace")


def chat_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs], top: int
) -> dict[str, Any]:
    """`logprobs` of a chat choice; `top` most likely tokens each."""
    return {"content": [_chat_entry(tokenizer, each, top) for each in entries], "refusal": None}


def _chat_entry(tokenizer: Tokenizer, entry: TokenLogprobs, top: int) -> dict[str, Any]:
    likeliest = sorted(entry.items(), key=lambda item: item[1].rank)[:top]
    token_id, logprob = next(iter(entry.items()))
    return {
        **_chat_token(tokenizer, token_id, logprob.logprob),
        "top_logprobs": [_chat_token(tokenizer, i, each.logprob) for i, each in likeliest],
    }


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.id_to_bytes(token_id)
    text = data.decode(errors="replace")
    return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(data)}


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprobs | None],
    *,
    top: int,
    offset: int = 0,
) -> dict[str, Any]:
    """`logprobs` of a completion's choice; the first token begins at character `offset`."""
    tokens = [token_text(tokenizer, token_id) for token_id in token_ids]
    offsets = [offset]
    for text in tokens[:-1]:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": tokens,
        "token_logprobs": [
            None if entry is None else max(entry[token_id].logprob, _LEAST)
            for token_id, entry in zip(token_ids, entries, strict=True)
        ],
        "top_logprobs": [
            None if entry is None else _tops(tokenizer, entry, top) for entry in entries
        ],
        "text_offset": offsets[: len(tokens)],
    }


def _tops(tokenizer: Tokenizer, entry: TokenLogprobs, top: int) -> dict[str, float]:
    """The likeliest by their texts; the token itself is always among them, as OpenAI has it."""
    own = next(iter(entry))
    kept = sorted(entry.items(), key=lambda item: item[1].rank)
    kept = [(i, each) for i, each in kept if each.rank <= top or i == own]
    # Of tokens with one text, the likelier comes first and stays.
    found: dict[str, float] = {}
    for token_id, logprob in kept:
        found.setdefault(token_text(tokenizer, token_id), max(logprob.logprob, _LEAST))
    return found


def prompt_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs | None]
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: by token id, as text; nothing for the first token."""
    return [None if entry is None else _prompt_entry(tokenizer, entry) for entry in entries]


def _prompt_entry(tokenizer: Tokenizer, entry: Mapping[int, Any]) -> dict[str, Any]:
    return {
        str(token_id): {
            "logprob": max(each.logprob, _LEAST),
            "rank": each.rank,
            "decoded_token": token_text(tokenizer, token_id),
        }
        for token_id, each in entry.items()
    }

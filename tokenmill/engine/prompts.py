"""The forms in which a prompt may be given."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, cast

from tokenmill.errors import UsageError

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, object]
"""A text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""
Prompts: TypeAlias = Prompt | Sequence[Prompt]
Conversation: TypeAlias = Sequence[Mapping[str, object]]
"""Messages {"role": ..., "content": ...}, oldest first."""


def prompt_list(prompts: Prompts) -> list[Prompt]:
    """One prompt or several, as a list; a list that begins with an integer is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise UsageError(f"prompts is a {type(prompts).__name__}, but must be a text or a list")
    if prompts and isinstance(prompts[0], int):
        return [cast(Sequence[int], prompts)]
    return list(cast(Sequence[Prompt], prompts))


def conversation_list(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """One conversation or several, as a list."""
    if _is_list(messages) and messages and _is_list(messages[0]):
        return list(cast(Sequence[Conversation], messages))
    return [cast(Conversation, messages)]


def prompt_text_and_ids(
    name: str, prompt: Prompt, encode: Callable[[str], list[int]]
) -> tuple[str | None, Sequence[int]]:
    """The text (None for a prompt of ids) and the token ids of one prompt.

    Raises UsageError, which begins with `name`, for what is none of the forms of a prompt.
    """
    plain = _unwrapped(name, prompt) if isinstance(prompt, Mapping) else prompt
    if isinstance(plain, str):
        return plain, _encoded(name, plain, encode)
    if isinstance(plain, Sequence):
        return None, cast(Sequence[int], plain)
    raise UsageError(f"{name} is a {type(prompt).__name__}, but must be a text or token ids")


def _unwrapped(name: str, prompt: Mapping[str, object]) -> str | Sequence[int]:
    if set(prompt) == {"prompt"} and isinstance(prompt["prompt"], str):
        return prompt["prompt"]
    ids = prompt.get("prompt_token_ids")
    if set(prompt) == {"prompt_token_ids"} and _is_list(ids):
        return cast(Sequence[int], ids)
    raise UsageError(
        f'{name} has the keys {sorted(prompt)}, but must be {{"prompt": text}} or '
        '{"prompt_token_ids": ids}'
    )


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _encoded(name: str, text: str, encode: Callable[[str], list[int]]) -> list[int]:
    try:
        return encode(text)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None

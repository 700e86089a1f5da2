"""What clients send, as the token ids that the model is to continue."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from tokenmill.errors import UsageError
from tokenmill.server.errors import refused
from tokenmill.server.requests import Message

if TYPE_CHECKING:
    from tokenmill.engine.llm import LLM

T = TypeVar("T")

_LONG_CHARS = 4096
"""A longer text is encoded beside the event loop, which would miss steps meanwhile."""

_RESERVED = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "self")
)


async def apart(work: Callable[[], T], num_chars: int) -> T:
    """Do work here, or in a thread where the text is long."""
    return await asyncio.to_thread(work) if num_chars > _LONG_CHARS else work()


async def encode(llm: "LLM", text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text; UsageError for what is no text."""
    tokenizer = llm.loaded.tokenizer
    return await apart(lambda: tokenizer.encode(text, add_special_tokens), len(text))


async def encode_chat(
    llm: "LLM",
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    variables: Mapping[str, Any] | None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_special_tokens: bool = False,
) -> list[int]:
    """Token ids that ask the model for the next message, or for the rest of the last one.

    Raises UsageError for messages that the model's template refuses, ApiError for fields that
    do not go together.
    """
    template = llm.loaded.chat_template
    if template is None:
        raise refused("messages", "this model has no chat template: use /v1/completions")
    if taken := _RESERVED & (variables or {}).keys():
        name = f"chat_template_kwargs.{min(taken)}"
        raise refused(name, f"{name} is not supported: the request has a field for it")
    if continue_final_message and add_generation_prompt:
        text = "continue_final_message needs add_generation_prompt: false"
        raise refused("continue_final_message", text)
    plain = [message.model_dump(exclude_unset=True, exclude_none=True) for message in messages]

    def work() -> list[int]:
        text = template.render(
            plain, add_generation_prompt=add_generation_prompt, tools=tools, **(variables or {})
        )
        if continue_final_message:
            text = _cut_after_last(text, message_text(messages[-1]))
        return llm.loaded.tokenizer.encode(text, add_special_tokens)

    return await apart(work, sum(len(message_text(message)) for message in messages))


def message_text(message: Message) -> str:
    """A message's content, parts joined as the template will see them."""
    if isinstance(message.content, list):
        return "\n".join(part.text for part in message.content)
    return message.content or ""


def truncated(ids: list[int], keep: int | None, longest: int) -> list[int]:
    """The last `keep` tokens of a prompt; -1: as many as leave room for the answer."""
    if keep is None:
        return ids
    if keep == 0:
        raise refused(
            "truncate_prompt_tokens", "truncate_prompt_tokens is 0: give 1 or more, or -1"
        )
    return ids[-(longest if keep == -1 else keep) :]


def _cut_after_last(text: str, content: str) -> str:
    """The text up to the end of the last message, so that the model goes on with it."""
    stripped = content.strip()  # templates strip what they place
    start = text.rfind(stripped) if stripped else -1
    if start < 0:
        raise UsageError(
            "continue_final_message has nothing to continue: the last message is empty, or the "
            "chat template changes it"
        )
    return text[: start + len(stripped)]

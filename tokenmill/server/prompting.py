"""What clients send, as the token ids that the model is to continue."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from tokenmill.errors import UsageError
from tokenmill.server.errors import refused
from tokenmill.server.requests import Message

if TYPE_CHECKING:
    from tokenmill.engine.llm import LLM

T = TypeVar("T")

LONG = 4096
"""Work on more characters or tokens is done beside the event loop, which would miss steps."""

_RESERVED = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "self")
)


class Encoder:
    """Makes token ids of what clients send, what is long in one thread beside the event loop.

    It is one thread, since each keeps the memory that its longest text took.
    """

    def __init__(self, llm: "LLM") -> None:
        self._llm = llm
        self._worker = ThreadPoolExecutor(1, "tokenmill-encode")

    async def apart(self, work: Callable[[], T], size: int) -> T:
        """Do work here, or where its size is LONG in the thread."""
        if size <= LONG:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    async def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool, is_bounded: bool
    ) -> list[list[int]]:
        """Token ids of texts; UsageError for what is no text.

        `is_bounded`: one that cannot fit into the context is refused before it is encoded.
        """
        if is_bounded:
            for text in texts:
                self.check_size(text)
        encode = self._llm.loaded.tokenizer.encode
        return await self.apart(
            lambda: [encode(text, add_special_tokens) for text in texts], sum(map(len, texts))
        )

    async def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any] | None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_special_tokens: bool = False,
        is_bounded: bool,
    ) -> list[int]:
        """Token ids that ask the model for the next message, or for the rest of the last one.

        Raises UsageError for messages that the model's template refuses, ApiError for fields
        that do not go together.
        """
        template = self._llm.loaded.chat_template
        if template is None:
            raise refused("messages", "this model has no chat template: use /v1/completions")
        reserved = _RESERVED | self._llm.loaded.tokenizer.named_tokens.keys()
        if taken := reserved & (variables or {}).keys():
            name = f"chat_template_kwargs.{min(taken)}"
            raise refused(name, f"{name} is not supported: the server sets it")
        if continue_final_message and add_generation_prompt:
            text = "continue_final_message needs add_generation_prompt: false"
            raise refused("continue_final_message", text)

        def work() -> list[int]:
            text = template.render(
                [message.model_dump(exclude_unset=True, exclude_none=True) for message in messages],
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                **(variables or {}),
            )
            if is_bounded:
                self.check_size(text)
            return self._llm.loaded.tokenizer.encode(text, add_special_tokens)

        return await self.apart(work, _num_chars(messages) + (LONG if tools or variables else 0))

    def close(self) -> None:
        """End the thread, and drop what waits for it."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def check_size(self, text: str) -> None:
        """UsageError for a text that cannot fit into the context."""
        longest = self._llm.max_model_len
        if len(text) > self._llm.loaded.tokenizer.max_chars(longest):
            raise UsageError(
                f"the prompt has {len(text)} characters, which is more than a context of {longest} "
                "tokens can hold: shorten it"
            )


def _num_chars(messages: Sequence[Message]) -> int:
    """About what they cost: a message is some work, however short."""
    return sum(64 + len(message_text(message)) for message in messages)


def message_text(message: Message) -> str:
    """A message's content, parts joined as the template will see them."""
    if isinstance(message.content, list):
        return "\n".join(part.text for part in message.content)
    return message.content or ""

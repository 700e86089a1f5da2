"""The history of a chat, kept within the model's context."""

from collections.abc import Callable, Sequence

from tokenmill.errors import CapacityError

Message = dict[str, str]
"""`role` (system, user, assistant) and `content`."""
Encode = Callable[[Sequence[Message]], list[int]]


class Conversation:
    """A system message, which stays, and messages of user and assistant in turn."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.messages: list[Message] = []

    def say(self, role: str, content: str) -> None:
        """Add what the user or the assistant said."""
        self.messages.append({"role": role, "content": content})

    def unsay(self) -> None:
        """Take back the last message."""
        self.messages.pop()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages.clear()

    def encode(self, encode: Encode, max_tokens: int) -> list[int]:
        """Token ids of the conversation, its oldest exchanges forgotten until they fit.

        Raises CapacityError where even the last message alone has more than `max_tokens`.
        """
        ids = encode(self._with_system())
        while len(ids) > max_tokens and len(self.messages) > 1:
            del self.messages[: self._first_exchange_len()]
            ids = encode(self._with_system())
        if len(ids) > max_tokens:
            raise CapacityError(
                f"the message has {len(ids)} tokens and the context has room for {max_tokens}: "
                "shorten it, or raise --max-model-len"
            )
        return ids

    def _with_system(self) -> list[Message]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.messages]

    def _first_exchange_len(self) -> int:
        """Messages up to the second one of the user: templates want the user to speak first."""
        roles = [message["role"] for message in self.messages]
        return roles.index("user", 1)

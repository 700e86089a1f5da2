"""Chat messages to the text that a model was trained to continue."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tokenmill.errors import ModelFileError, UsageError
from tokenmill.models.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jinja2 import Template

    from tokenmill.models.text.template_sandbox import ChatEnvironment

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

Message = Mapping[str, Any]


class ChatTemplate:
    """The chat template of one model, or several by name ("default", "tool_use").

    `named_tokens` are texts that the templates may use by name, such as `bos_token`. Several
    threads may use it at once, and none waits for another.
    """

    def __init__(
        self, source: str | Mapping[str, str], named_tokens: Mapping[str, str] | None = None
    ) -> None:
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        self._named_tokens = dict(named_tokens or {})
        # An environment's allowance is for one rendering at a time; there are as many as it takes.
        self._idle: list[tuple[ChatEnvironment, dict[str, Template]]] = []

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatTemplate":
        """The template that a tokenizer came with. Raises UsageError where there is none."""
        if not tokenizer.chat_templates:
            raise UsageError(
                "the model has no chat template: give it a plain prompt, or take a model that "
                "was trained for chat"
            )
        return cls(tokenizer.chat_templates, tokenizer.named_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation; `variables` are given to the template as they are.

        With `continue_final_message` it ends where the last message's content does, trailing
        blanks included unless the template takes them away, so that the model goes on with it.
        It already holds the tokens that begin a sequence: encode it with
        `add_special_tokens=False`. Raises UsageError for messages that are malformed or that the
        template refuses, ModelFileError for a template which is broken or does what it may not.
        """
        checked, mark = check_messages(messages), ""
        if continue_final_message:
            mark = f"[end {secrets.token_hex(8)}]"
            last = checked[-1]
            checked[-1] = {**last, "content": f"{last.get('content') or ''}{mark} "}
        values = {
            "documents": None,
            **self._named_tokens,
            **variables,
            "messages": checked,
            "tools": None if tools is None else _plain(tools, "tools"),
            "add_generation_prompt": add_generation_prompt,
        }
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            raise UsageError(
                f"the model has no default chat template, only {', '.join(self._sources)}"
            )
        text = self._run(name, values)
        return _before_mark(text, mark) if mark else text

    def _run(self, name: str, values: Mapping[str, Any]) -> str:
        from jinja2 import TemplateSyntaxError, UndefinedError
        from jinja2.exceptions import SecurityError

        from tokenmill.models.text.template_sandbox import TemplateLimitError, TemplateRefusedError

        try:
            with self._template(name) as template:
                return template.render(values)
        except TemplateRefusedError as error:
            raise UsageError(f"the chat template refuses the messages: {error}") from error
        except TemplateSyntaxError as error:
            raise ModelFileError(
                f"the chat template is broken at line {error.lineno}: {error}"
            ) from error
        except (TemplateLimitError, SecurityError, RecursionError, MemoryError) as error:
            raise ModelFileError(f"the chat template was stopped: {error}") from error
        except UndefinedError as error:
            raise UsageError(f"the chat template misses something: {error}") from error
        except Exception as error:  # a template can raise whatever Python can
            raise UsageError(
                f"the chat template cannot render these messages: {type(error).__name__}: {error}"
            ) from error

    @contextmanager
    def _template(self, name: str) -> "Iterator[Template]":
        """A template in an environment that nobody else uses meanwhile."""
        from tokenmill.models.text.template_sandbox import ChatEnvironment

        environment, compiled = self._idle.pop() if self._idle else (ChatEnvironment(), {})
        try:
            environment.begin()
            if name not in compiled:
                compiled[name] = environment.from_string(self._sources[name])
            yield compiled[name]
        finally:
            self._idle.append((environment, compiled))


def _before_mark(text: str, mark: str) -> str:
    """The text up to a mark, and without the blanks before it where the blank behind is gone.

    A mark stands for the end of a message: its content may occur elsewhere, in the template's own
    text too. The blank shows whether the template strips messages, as transformers has it.
    """
    before, found, after = text.rpartition(mark)
    if not found:
        raise UsageError(
            "continue_final_message has nothing to continue: the chat template leaves out the "
            "last message"
        )
    return before if after.startswith(" ") else before.rstrip()


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as plain JSON values, content parts joined to one text.

    Raises UsageError that names the message which is wrong.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise UsageError(f"messages is {_kind(messages)}, but must be a list of messages")
    if not messages:
        raise UsageError("messages is empty: give at least one message")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_message(message: Message, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(
            f"{where} is {_kind(message)}, but must be an object with role and content"
        )
    plain: dict[str, Any] = _plain(message, where)
    role = plain.get("role")
    if role not in ROLES:
        raise UsageError(f"{where}: role is {role!r}, but must be one of {', '.join(ROLES)}")
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = "\n".join(
            _text_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)
        )
    elif content is None and not plain.get("tool_calls"):
        raise UsageError(f"{where}: content is missing")
    elif not isinstance(content, str | None):
        raise UsageError(
            f"{where}: content is {_kind(content)}, but must be a text or a list of parts"
        )
    return plain


def _text_part(part: object, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    found = part.get("type") if isinstance(part, dict) else _kind(part)
    raise UsageError(f"{where}: part {found!r} is not supported, only 'text' parts with a text")


def _plain(value: Any, where: str) -> Any:
    """A copy made of JSON values alone, so that a template meets no object with methods."""
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, Mapping):
        return {_key(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise UsageError(f"{where} is {_kind(value)}, but must be a JSON value")


def _key(key: object, where: str) -> str:
    if type(key) is not str:
        raise UsageError(f"{where} has key {key!r}, but keys must be texts")
    return key


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"

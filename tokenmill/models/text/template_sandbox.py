"""Where chat templates run: Jinja's sandbox, with the functions that chat templates expect.

A template comes with a model, from anyone. The sandbox keeps it away from Python's internals; the
allowance below keeps it from running or growing without end, be it by mistake or by a simple
bomb. It is no jail: a single operation may still be costly.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Sized
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARS = 2**26  # produced in one rendering, intermediate texts included
MAX_SECONDS = 5.0  # of processor time, so that a busy machine refuses nothing

_WIDTH_FILTERS = frozenset({"batch", "center", "indent", "slice", "tojson", "wordwrap"})
_UNWANTED_GLOBALS = ("lipsum", "cycler", "joiner")


class TemplateLimitError(TemplateError):
    """The template ran too long or made too much text."""


class TemplateRefusedError(TemplateError):
    """The template called `raise_exception`: it does not take these messages."""


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Compiles and runs the templates of one model, one at a time.

    `begin` grants an allowance for the rendering that follows; whatever repeats or grows is paid
    for from it, and TemplateLimitError is raised when it is used up.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, max_chars: int = MAX_CHARS, max_seconds: float = MAX_SECONDS) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=self.paid,
            extensions=[_GenerationTag, loopcontrols],
        )
        self.code_generator_class = _MeteredCode
        self._max_chars = max_chars
        self._max_seconds = max_seconds
        self.filters["tojson"] = _to_json
        self.filters = {name: self._metered(name, run) for name, run in self.filters.items()}
        self.globals = {k: v for k, v in self.globals.items() if k not in _UNWANTED_GLOBALS}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.begin()

    def begin(self) -> None:
        """Grant a new allowance."""
        self._chars_left = self._max_chars
        self._deadline = time.thread_time() + self._max_seconds

    def pay(self, num_chars: int) -> None:
        """Take so many characters, and the time since, from the allowance."""
        self._chars_left -= num_chars
        if self._chars_left < 0:
            raise TemplateLimitError(f"it made more than {self._max_chars} characters")
        if time.thread_time() > self._deadline:
            raise TemplateLimitError(f"it ran for more than {self._max_seconds:g} s")

    def paid(self, value: Any) -> Any:
        """The value, once it is paid for."""
        self.pay(_size(value))
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.pay(_result_size(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(function, "__wrapped__", function)
        if isinstance(text := getattr(method, "__self__", None), str):
            counts = sum(abs(arg) for arg in (*args, *kwargs.values()) if isinstance(arg, int))
            self.pay(counts + (_format_size(text) if method.__name__ == "format" else 0))
        return self.paid(super().call(context, function, *args, **kwargs))

    def _metered(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)  # keeps the marks by which Jinja knows what to pass
        def run_paid(*args: Any, **kwargs: Any) -> Any:
            self.pay(sum(map(_size, args)))
            if name in _WIDTH_FILTERS:
                self.pay(sum(a for a in (*args[1:], *kwargs.values()) if isinstance(a, int)))
            if name == "format":
                self.pay(_format_size(str(args[0])))
            return self.paid(run(*args, **kwargs))

        return run_paid


class _MeteredCode(CodeGenerator):
    """Compiles loops and `~` such that they pay."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802
        size = 1 + sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        pay = nodes.Call(
            nodes.EnvironmentAttribute("pay"), [nodes.Const(size)], [], None, None
        ).set_lineno(node.lineno)
        node.body.insert(0, nodes.ExprStmt(pay).set_lineno(node.lineno))
        if node.test is not None:
            node.test = nodes.And(nodes.Not(pay), node.test)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.paid(")
        super().visit_Concat(node, frame)
        self.write(")")


class _GenerationTag(Extension):
    """`{% generation %}` marks what a model is trained on; for us it is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _size(value: object) -> int:
    return 1 + len(value) if isinstance(value, Sized) else 1


def _result_size(operator: str, left: Any, right: Any) -> int:
    """At least the characters, items or bits that the operator will produce."""
    if operator == "%" and isinstance(left, str):
        return _format_size(left) + _size(right)
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * max(1, right) if operator == "**" else left.bit_length()
    if operator == "*":
        count = max(0, *(n for n in (left, right) if isinstance(n, int)), 0)
        return count * max(_size(left), _size(right))
    return _size(left) + _size(right)


def _format_size(template: str) -> int:
    """What the widths in a format ask for; one that is given at run time counts as boundless."""
    if "*" in template:
        return MAX_CHARS
    return len(template) + sum(int(width[:9]) for width in re.findall(r"\d+", template))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateRefusedError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)

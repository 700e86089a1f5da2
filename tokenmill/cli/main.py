"""The console command `tokenmill`: find the command, and import it and nothing else.

argparse, because a start must be fast: the libraries above it take a tenth of a second.
"""

import argparse
import importlib
import io
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import tokenmill
from tokenmill.cli.exits import run_guarded

COMMANDS = {
    "serve": "serve a model over HTTP, as OpenAI's API has it",
    "run": "generate text from a prompt",
    "chat": "talk with a model",
    "embed": "make vectors of texts",
    "quantize": "write a model's GGUF file anew in 8 or 4 bits",
    "pull": "fetch a model and verify it",
    "models": "list models and what they take of the disk, or delete them",
    "bench": "measure a server, or the engine in this process",
    "collectives": "simulate and explain all-reduce and its kin",
    "explain": "show the life of one operation, from the model to machine code",
}
"""Each is a module of that name: `add_arguments(parser)`, and a function of the same name which
takes what was parsed."""


class Parser(argparse.ArgumentParser):
    """Says in one line what was wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see `{self.prog} --help`)\n")


class Formatter(argparse.HelpFormatter):
    """Leaves room for the longest command: argparse forgets that commands are indented."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action.choices, dict):
            longest = max(map(len, action.choices)) + 2 * self._indent_increment
            self._action_max_length = max(self._action_max_length, longest)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0, 1 for a failure, 2 for wrong use, 130 when interrupted."""
    words, is_debug = _take_debug(list(sys.argv[1:] if arguments is None else arguments))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?"
    sys.exit(run_guarded(lambda: _dispatch(words), is_debug=is_debug))


def _dispatch(words: list[str]) -> None:
    name = next((word for word in words if not word.startswith("-")), None)
    parser, subparsers = _make_parser()
    if name is None and not words:
        parser.print_help(sys.stderr)
        sys.exit(2)
    if name not in COMMANDS:
        parser.parse_args(words)  # prints help or the version, or says what is wrong
        raise AssertionError("there is no command, and argparse accepts it")
    module = importlib.import_module(f"tokenmill.cli.{name}")
    module.add_arguments(subparsers[name])
    values = vars(parser.parse_args(words))
    command: Callable[..., None] = getattr(module, values.pop("command"))
    command(**values)


def _make_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and those of the commands, which have no arguments yet."""
    parser = Parser(
        prog="tokenmill",
        description="Serve large language models end to end.",
        formatter_class=Formatter,
        epilog="--debug, anywhere in the line, shows the traceback of an error.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tokenmill {tokenmill.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    subparsers = {
        name: commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
        )
        for name, text in COMMANDS.items()
    }
    return parser, subparsers


def _take_debug(words: list[str]) -> tuple[list[str], bool]:
    """`--debug` counts anywhere before `--`, as people append it to the line that failed."""
    end = words.index("--") if "--" in words else len(words)
    rest = [word for word in words[:end] if word != "--debug"]
    return rest + words[end:], len(rest) < end

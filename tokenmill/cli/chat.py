"""`tokenmill chat`: talk with a model."""

import sys
from argparse import ArgumentParser
from contextlib import closing
from typing import TYPE_CHECKING

from tokenmill.cli import arguments
from tokenmill.cli.conversation import Conversation
from tokenmill.cli.exits import print_error
from tokenmill.cli.interrupts import watch_interrupts
from tokenmill.cli.loading import check_text, open_llm
from tokenmill.errors import TokenmillError, UsageError

if TYPE_CHECKING:
    from tokenmill.engine.adapters import LoRARequest
    from tokenmill.engine.llm import LLM
    from tokenmill.sampling.params import SamplingParams

HELP = """\
/reset         forget the conversation
/system TEXT   set the instructions that precede it (nothing: remove them) and forget it
/exit          leave, as does Ctrl-D; Ctrl-C stops an answer"""


def add_arguments(parser: ArgumentParser) -> None:
    arguments.add_lora_argument(parser)
    arguments.add_sampling_arguments(parser)
    arguments.add_engine_arguments(parser)


def chat(*, system: str | None, **values: object) -> None:
    """Talk with a model until the user leaves."""
    given = arguments.given_sampling(values)
    config = arguments.make_engine_config(values)
    with open_llm(config) as llm:
        if llm.loaded.chat_template is None:
            raise UsageError(f"{config.model} has no chat template: use `tokenmill run --raw`")
        params = llm.default_params(arguments.SAMPLING_FALLBACK, **given)
        Chat(llm, params, system, arguments.make_lora_request(values["lora"])).loop()


class Chat:
    """Reads lines and answers them until the user leaves."""

    def __init__(
        self,
        llm: "LLM",
        params: "SamplingParams",
        system: str | None,
        lora: "LoRARequest | None" = None,
    ) -> None:
        self._llm = llm
        self._lora = lora
        self._params = params
        self._conversation = Conversation(system)

    def loop(self) -> None:
        is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if is_interactive:
            import readline  # noqa: F401  (gives input() editing and history)

            print("Type a message; /help lists commands.", file=sys.stderr)
        while (line := _read_line(">>> " if is_interactive else "")) is not None:
            if line.startswith("/"):
                if not self._obey(line):
                    return
            elif line:
                self._answer_or_explain(line)

    def _obey(self, line: str) -> bool:
        """Carry out a command; False to leave."""
        command, _, text = line.partition(" ")
        if command in ("/exit", "/quit"):
            return False
        if command == "/reset":
            self._conversation.reset()
        elif command == "/system":
            self._conversation = Conversation(text.strip() or None)
        else:
            print(HELP, file=sys.stderr)
        return True

    def _answer_or_explain(self, line: str) -> None:
        """A message that cannot be answered is taken back, and the chat goes on."""
        self._conversation.say("user", line)
        try:
            check_text(line, "the message")
            answer = self._answer()
        except TokenmillError as error:
            self._conversation.unsay()
            print_error(str(error))
        else:
            self._conversation.say("assistant", answer)

    def _answer(self) -> str:
        """Stream the answer to the conversation; Ctrl-C ends it where it is."""
        ids = self._conversation.encode(self._llm.apply_chat_template, self._prompt_limit())
        pieces = []
        with (
            watch_interrupts() as interrupt,
            closing(self._llm.stream(ids, self._params, lora_request=self._lora)) as deltas,
        ):
            for delta in deltas:
                pieces.append(delta.text)
                print(delta.text, end="", flush=True)
                if interrupt.is_set:
                    print("\n(stopped)", end="", file=sys.stderr, flush=True)
                    break
        print(flush=True)
        return "".join(pieces)

    def _prompt_limit(self) -> int:
        """Tokens of history for which there is room beside an answer, at least half the context."""
        context = self._llm.max_model_len
        return max(context // 2, context - (self._params.max_tokens or 0))


def _read_line(prompt: str) -> str | None:
    """The next line without surrounding blanks; None at the end of input."""
    while True:
        try:
            return input(prompt).strip()
        except EOFError:
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)", file=sys.stderr)
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input is not UTF-8: {error.reason}") from error

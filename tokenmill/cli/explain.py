"""`tokenmill explain`: the life of one operation, from the model's definition to machine code."""

import linecache
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from functools import partial

from tokenmill.backends.llvm.program import Numerics, passes_of
from tokenmill.backends.llvm.target import ROWS, pick_row
from tokenmill.cli.arguments import add_model_argument
from tokenmill.cli.life import Life
from tokenmill.cli.listing import WIDTH, Style
from tokenmill.cli.subject import Subject, find_value, load_subject, named_values, subject_with
from tokenmill.config import ACTIVATIONS
from tokenmill.models.adapters import TARGETS
from tokenmill.passes.add_adapters import LOW_RANK_OPS, AdapterRoom, add_adapters

_ROOM = AdapterRoom(slots=2, rank=16, dtype="lora16")
"""Of the adapters that are shown where an operation needs some."""


def add_arguments(parser: ArgumentParser) -> None:
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument(
        "--op",
        metavar="NAME",
        help="an operation of the IR, as in `linear`, or a value of the model, as in `gate`",
    )
    wanted.add_argument("--list", action="store_true", dest="is_list", help="what NAME can be")
    add_model_argument(parser)
    parser.add_argument(
        "--isa", choices=[row.name for row in ROWS], help="instruction set (default: the best here)"
    )
    parser.add_argument(
        "--activations",
        choices=ACTIVATIONS,
        default="bf16",
        help="format of the activations (default: %(default)s)",
    )
    parser.add_argument("--full", action="store_true", help="leave nothing out of the listings")


def explain(
    *, op: str | None, is_list: bool, model: str, isa: str | None, activations: str, full: bool
) -> None:
    """Show one operation as model code, IR, after each pass, LLVM IR and assembly."""
    subject = load_subject(model)
    style = Style.of(sys.stdout)
    if is_list or op is None:
        print("\n".join(_list_lines(subject, style)))
        return
    subject = subject_with(subject, op)
    cache = "f32" if activations == "f32" else "bf16"
    passes = passes_of(subject.formats, Numerics(activations=activations, cache=cache))
    if op in LOW_RANK_OPS:
        passes = (("add_adapters", partial(add_adapters, room=_ROOM, targets=TARGETS)), *passes)
    life = Life(
        subject=subject,
        value=find_value(subject, op, passes),
        passes=passes,
        row=pick_row(isa),
        activations=activations,
        style=style,
    )
    print("\n".join(life.parts(is_full=full)))


def _list_lines(subject: Subject, style: Style) -> Iterator[str]:
    if subject.note:
        yield style.faint(f"({subject.note})")
    yield style.bold(f"{'NAME':<16}{'OPERATION':<14}{'TYPE':<16}MADE BY")
    seen: set[str] = set()
    for value in named_values(subject.graph):
        name = value.name if value.name not in seen else f"{value.function}.{value.name}"
        seen.add(value.name)
        line = subject.origins[value.function, value.node.result.name][-1]
        text = linecache.getline(str(line.path), line.number).strip()
        shown = f"{name:<16}{value.node.op:<14}{value.node.result.type!s:<16}{text}"
        yield shown if len(shown) <= WIDTH else f"{shown[: WIDTH - 3]}..."
    yield ""
    yield "An operation's name stands for its first value."

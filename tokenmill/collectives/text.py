"""The text form of a program, exact both ways: `parse(print_program(p)) == p`.

    program all_reduce by ring {
      task {ranks=2, count=8}
      plan {}
      rank 0 {
        buffer data[8]
        0: send data[4:8] to 1 tag 0
        1: recv_reduce data[0:4] from 1 tag 0
        2: send data[0:4] to 1 tag 0 after 1
        3: recv data[4:8] from 1 tag 0 after 0
      }
    }

Fields of task and plan that have their default are left out; `wide` marks a buffer of accumulators;
other steps are `copy A[0:4] to B[4:8]` and `reduce A[0:4] into B[4:8]`; ranges are joined by
commas.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import TypeVar

from tokenmill.collectives.program import (
    Buffer,
    Chunk,
    Copy,
    Plan,
    Program,
    RankProgram,
    Recv,
    RecvReduce,
    Reduce,
    Send,
    Step,
)
from tokenmill.collectives.task import Task
from tokenmill.errors import UsageError

_CHUNK = r"(\w+)\[([\d:,]+)\]"
_AFTER = r"(?: after (\d+(?:, \d+)*))?"
_HEAD = re.compile(r"program (\w+) by (\w+) \{")
_FIELDS = {name: re.compile(rf"{name} \{{(.*)\}}") for name in ("task", "plan")}
_RANK = re.compile(r"rank (\d+) \{")
_BUFFER = re.compile(r"buffer (\w+)\[(\d+)\]( wide)?")
_MESSAGE = re.compile(rf"(\d+): (send|recv|recv_reduce) {_CHUNK} (to|from) (\d+) tag (\d+){_AFTER}")
_LOCAL = re.compile(rf"(\d+): (copy|reduce) {_CHUNK} (to|into) {_CHUNK}{_AFTER}")
_MESSAGES: dict[str, type[Send] | type[Recv] | type[RecvReduce]] = {
    "send": Send,
    "recv": Recv,
    "recv_reduce": RecvReduce,
}
_PREPOSITIONS = {
    **{"send": "to", "recv": "from", "recv_reduce": "from"},
    **{"copy": "to", "reduce": "into"},
}
_Config = TypeVar("_Config", Task, Plan)


class ProgramSyntaxError(ValueError):
    """The text is no program; says the line and what was expected."""


def print_program(program: Program) -> str:
    """The program as text, one step a line."""
    lines = [
        f"program {program.task.op} by {program.plan.algorithm} {{",
        f"  task {{{_print_fields(program.task, 'op')}}}",
        f"  plan {{{_print_fields(program.plan, 'algorithm')}}}",
    ]
    for here in program.ranks:
        lines.extend("  " + line for line in print_rank(here).splitlines())
    return "\n".join([*lines, "}"]) + "\n"


def print_rank(here: RankProgram) -> str:
    """The part of one rank as text."""
    lines = [f"rank {here.rank} {{"]
    for buffer in here.buffers:
        lines.append(f"  buffer {buffer.name}[{buffer.count}]{' wide' * buffer.is_wide}")
    lines.extend(f"  {index}: {print_step(step)}" for index, step in enumerate(here.steps))
    return "\n".join([*lines, "}"])


def print_step(step: Step) -> str:
    """One step as text, without its number."""
    after = f" after {', '.join(map(str, step.after))}" if step.after else ""
    if isinstance(step, Copy | Reduce):
        name = "copy" if isinstance(step, Copy) else "reduce"
        chunks = f"{_print_chunk(step.source)} {_PREPOSITIONS[name]} {_print_chunk(step.target)}"
        return f"{name} {chunks}{after}"
    name = next(name for name, kind in _MESSAGES.items() if type(step) is kind)
    ends = f"{_PREPOSITIONS[name]} {step.peer} tag {step.tag}"
    return f"{name} {_print_chunk(step.chunk)} {ends}{after}"


def _print_chunk(chunk: Chunk) -> str:
    return f"{chunk.buffer}[{','.join(f'{start}:{stop}' for start, stop in chunk.ranges)}]"


def _print_fields(config: Task | Plan, left_out: str) -> str:
    shown = (f for f in fields(config) if f.name != left_out)
    pairs = ((f, getattr(config, f.name)) for f in shown)
    return ", ".join(
        f"{f.name}={value!r}" for f, value in pairs if f.default is MISSING or value != f.default
    )


class _Lines:
    """The text line by line, with line numbers for messages."""

    def __init__(self, text: str) -> None:
        numbered = enumerate((line.strip() for line in text.splitlines()), start=1)
        self._rest = [(n, line) for n, line in numbered if line and not line.startswith("//")]
        self._rest.reverse()
        self.line = ""

    def take(self, expected: str) -> str:
        if not self._rest:
            raise ProgramSyntaxError(f"the text ends where {expected} was expected")
        self.number, self.line = self._rest.pop()
        return self.line

    def match(self, pattern: re.Pattern[str], expected: str) -> re.Match[str]:
        found = pattern.fullmatch(self.line)
        if found is None:
            raise self.fail(expected)
        return found

    def fail(self, expected: str) -> ProgramSyntaxError:
        return ProgramSyntaxError(f"line {self.number}: expected {expected}, found {self.line!r}")

    def end(self) -> None:
        if self._rest:
            self.take("")
            raise self.fail("the end of the text")


def parse(text: str) -> Program:
    """Read a program back. Raises ProgramSyntaxError."""
    lines = _Lines(text)
    lines.take("program OP by ALGORITHM {")
    head = lines.match(_HEAD, "program OP by ALGORITHM {")
    task = _parse_fields(lines, "task", Task, {"op": head[1]})
    plan = _parse_fields(lines, "plan", Plan, {"algorithm": head[2]})
    ranks = []
    while lines.take("rank or }") != "}":
        ranks.append(_parse_rank(lines))
    lines.end()
    return Program(task, plan, tuple(ranks))


def _parse_fields(
    lines: _Lines, name: str, kind: type[_Config], given: dict[str, object]
) -> _Config:
    """Fields are the keyword arguments of a Python call."""
    lines.take(f"{name} {{...}}")
    text = lines.match(_FIELDS[name], f"{name} {{...}}")[1]
    try:
        call = ast.parse(f"_({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("not a list of fields")
        values = {str(word.arg): _parse_value(word.value) for word in call.keywords}
        return kind(**given, **values)  # type: ignore[arg-type]  # they check themselves
    except UsageError as error:
        raise ProgramSyntaxError(f"line {lines.number}: {error}") from None
    except (SyntaxError, TypeError, ValueError):
        raise lines.fail(f"fields such as {name} {{ranks=4, count=16}}") from None


def _parse_value(node: ast.expr) -> object:
    value: object = ast.literal_eval(node)
    values = value if isinstance(value, tuple) else (value,)
    if not all(type(v) is int for v in values):
        raise ValueError("not a number or numbers")
    return value


def _parse_rank(lines: _Lines) -> RankProgram:
    rank = int(lines.match(_RANK, "rank N {")[1])
    buffers: list[Buffer] = []
    steps: list[Step] = []
    while lines.take("a buffer, a step or }") != "}":
        found = _BUFFER.fullmatch(lines.line)
        if found and not steps:
            buffers.append(Buffer(found[1], int(found[2]), found[3] is not None))
        else:
            steps.append(_parse_step(lines, len(steps)))
    return RankProgram(rank, tuple(buffers), tuple(steps))


def _parse_step(lines: _Lines, index: int) -> Step:
    found = _MESSAGE.fullmatch(lines.line) or lines.match(_LOCAL, f"{index}: STEP")
    name = found[2]
    if int(found[1]) != index or found[5] != _PREPOSITIONS[name]:
        raise lines.fail(f"{index}: {name} CHUNK {_PREPOSITIONS[name]} ...")
    chunk = _parse_chunk(lines, found[3], found[4])
    if name in _MESSAGES:
        after = tuple(_numbers(found[8]))
        return _MESSAGES[name](chunk, int(found[6]), int(found[7]), after)
    target = _parse_chunk(lines, found[6], found[7])
    return (Copy if name == "copy" else Reduce)(chunk, target, tuple(_numbers(found[8])))


def _numbers(text: str | None) -> Iterator[int]:
    return (int(word) for word in (text.split(", ") if text else ()))


def _parse_chunk(lines: _Lines, buffer: str, text: str) -> Chunk:
    bounds = [part.split(":") for part in text.split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in bounds):
        raise lines.fail("ranges such as [0:4,8:12]")
    return Chunk(buffer, tuple((int(start), int(stop)) for start, stop in bounds))

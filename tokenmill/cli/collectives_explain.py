"""`tokenmill collectives explain`: the schedule of a small case, as text and as a picture."""

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.cli import collectives_arguments as shared
from tokenmill.errors import UsageError

if TYPE_CHECKING:
    from tokenmill.collectives.program import Plan, Program
    from tokenmill.collectives.prove import Proof
    from tokenmill.collectives.task import Task

_MOST_RANKS = 16


def add_arguments(parser: ArgumentParser) -> None:
    shared.add_task_arguments(parser, ranks=4, slices=1)
    parser.add_argument("--algorithm", metavar="NAME", help="default: the first that there is")
    parser.add_argument(
        "--count", type=int, metavar="N", help="elements of the vector (default: one for each part)"
    )
    parser.add_argument(
        "--program", action="store_true", help="print the program itself, as it is executed"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the schedule")


def explain(values: dict[str, Any]) -> None:
    """Print the schedule or the program, and write the picture."""
    from tokenmill.collectives.catalog import write_program
    from tokenmill.collectives.prove import prove

    if not values["program"] and values["ranks"] > _MOST_RANKS:
        raise UsageError(
            f"--ranks is {values['ranks']}, but a schedule of more than {_MOST_RANKS} cannot be "
            "read: give fewer, or --program"
        )
    task, plan = _task_and_plan(values)
    program = write_program(task, plan)
    proof = prove(program)
    if values["program"]:
        from tokenmill.collectives.text import print_program

        print(print_program(program), end="")
    else:
        _print_schedule(program, proof)
    if values["svg"] is not None:
        _draw(values["svg"], program)


def _task_and_plan(values: dict[str, Any]) -> "tuple[Task, Plan]":
    """A vector that every cut divides, unless --count says otherwise."""
    from tokenmill.collectives.catalog import algorithms_of
    from tokenmill.collectives.program import Plan

    op = shared.read_op(values["op"])
    name = values["algorithm"] or algorithms_of(op)[0].name
    plan = Plan(
        algorithm=name, slices=values["slices"], hosts=values["hosts"], width=values["width"]
    )
    count = values["count"]
    if count is None:
        count = values["ranks"] * plan.slices * {"torus": 4, "tree": 2}.get(name, 1)
    return shared.make_task(values, count), plan


def _print_schedule(program: "Program", proof: "Proof") -> None:
    from tokenmill.collectives.draw import draw_text
    from tokenmill.collectives.trace import trace

    task = program.task
    size = "" if task.op == "barrier" else f" of {task.count} elements"
    print(f"{_title(program)}{size}: proved")
    order = "; every sum in order of rank" if proof.is_ordered else ""
    print(
        f"{_counted(proof.num_steps, 'step')}, {_counted(proof.num_messages, 'message')}, "
        f"at most {proof.most_sent} elements sent by a rank{order}\n"
    )
    print(draw_text(trace(program)), end="")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _title(program: "Program") -> str:
    plan = program.plan
    hosts = f" on {plan.hosts} hosts" if plan.hosts > 1 else ""
    slices = f" in {plan.slices} slices" if plan.slices > 1 else ""
    return f"{program.task.op} by {plan.algorithm}, {program.task.ranks} ranks{hosts}{slices}"


def _draw(path: Path, program: "Program") -> None:
    from tokenmill.collectives.draw import draw_svg
    from tokenmill.collectives.trace import trace
    from tokenmill.loadgen.report import save_text

    if program.task.ranks > _MOST_RANKS:
        raise UsageError(f"--svg draws at most {_MOST_RANKS} ranks")
    save_text(path, draw_svg(trace(program), _title(program)))
    print(f"saved {path}", file=sys.stderr)

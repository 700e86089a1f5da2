"""The default way to choose a plan: the tuner, with what the user demands."""

import os

from tokenmill.collectives.layout import Layout
from tokenmill.collectives.program import Plan
from tokenmill.collectives.task import Task
from tokenmill.collectives.tuner import VARIABLE, Override, choose, parse_overrides


def choose_plan(
    task: Task,
    layout: Layout,
    num_bytes: int,
    *,
    algorithm: str | None = None,
    slices: int | None = None,
    is_ordered: bool = False,
) -> Plan:
    """What is given comes before what the environment says, and that before the tuner's choice.

    Raises UsageError where what is demanded cannot be had.
    """
    override = Override(algorithm=algorithm, slices=slices)
    if algorithm is None and slices is None:
        override = parse_overrides(os.environ.get(VARIABLE, "")).get(task.op, override)
    choice = choose(task, layout.topology, num_bytes, override=override, is_ordered=is_ordered)
    return choice.plan

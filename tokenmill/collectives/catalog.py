"""Which algorithm does which operation, and the way from a task and a plan to a program."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from tokenmill.collectives.algorithms import (
    bruck,
    direct,
    doubling,
    hierarchical,
    ring,
    torus,
    tree,
)
from tokenmill.collectives.program import Buffer, Plan, Program, RankProgram
from tokenmill.collectives.records import Record, dependencies, make_step
from tokenmill.collectives.task import Task
from tokenmill.collectives.writer import Scope, Writer
from tokenmill.errors import UsageError

WriteFunction: TypeAlias = Callable[[Scope, Writer], None]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """How one operation is done."""

    op: str
    name: str
    write: WriteFunction
    is_ordered: bool = False
    """Every element is reduced in ascending order of rank: its bits depend on nothing else."""
    is_streaming: bool = False
    """Slices follow one another through a chain, on one lane."""
    has_places: bool = True
    """`Plan.order` applies."""
    needs_hosts: bool = False
    """Ranks must spread evenly over the hosts."""
    needs_grid: bool = False
    """Rows must divide the ranks."""
    takes_sizes: bool = True
    """Blocks may be of any sizes."""


def _algorithms() -> Iterator[Algorithm]:
    for op, write in (
        ("all_reduce", ring.all_reduce),
        ("reduce_scatter", ring.reduce_scatter),
        ("all_gather", ring.all_gather),
    ):
        yield Algorithm(op=op, name="ring", write=write)
    yield Algorithm(op="broadcast", name="ring", write=ring.broadcast, is_streaming=True)
    yield Algorithm(op="reduce", name="ring", write=ring.reduce, is_streaming=True)
    for op, write in (
        ("all_reduce", hierarchical.all_reduce),
        ("reduce_scatter", hierarchical.reduce_scatter),
        ("all_gather", hierarchical.all_gather),
    ):
        yield Algorithm(op=op, name="hierarchical", write=write, needs_hosts=True)
    yield Algorithm(
        op="all_reduce", name="leader", write=hierarchical.leader_all_reduce, needs_hosts=True
    )
    for op, write in (
        ("all_reduce", tree.all_reduce),
        ("broadcast", tree.broadcast),
        ("reduce", tree.reduce),
    ):
        yield Algorithm(op=op, name="tree", write=write)
    for op, write in (
        ("all_reduce", torus.all_reduce),
        ("reduce_scatter", torus.reduce_scatter),
        ("all_gather", torus.all_gather),
    ):
        yield Algorithm(op=op, name="torus", write=write, needs_grid=True)
    yield Algorithm(op="all_reduce", name="recursive_doubling", write=doubling.all_reduce)
    yield Algorithm(op="all_gather", name="recursive_doubling", write=doubling.all_gather)
    yield Algorithm(op="barrier", name="recursive_doubling", write=doubling.barrier)
    yield Algorithm(op="all_reduce", name="rabenseifner", write=doubling.rabenseifner_all_reduce)
    yield Algorithm(op="reduce_scatter", name="rabenseifner", write=doubling.reduce_scatter)
    for op, name, write in (
        ("all_reduce", "one_shot", direct.one_shot_all_reduce),
        ("all_reduce", "two_shot", direct.two_shot_all_reduce),
        ("reduce_scatter", "one_shot", direct.reduce_scatter),
        ("reduce", "one_shot", direct.reduce),
    ):
        yield Algorithm(op=op, name=name, write=write, is_ordered=True, has_places=False)
    for op, write in (
        ("all_gather", direct.all_gather),
        ("broadcast", direct.broadcast),
        ("all_to_all", direct.all_to_all),
        ("send_recv", direct.send_recv),
    ):
        yield Algorithm(op=op, name="one_shot", write=write, has_places=False)
    yield Algorithm(
        op="all_to_all", name="bruck", write=bruck.all_to_all, has_places=False, takes_sizes=False
    )


ALGORITHMS = {(a.op, a.name): a for a in _algorithms()}


def algorithms_of(op: str) -> tuple[Algorithm, ...]:
    """What can do an operation, in the order of the catalog."""
    return tuple(a for a in ALGORITHMS.values() if a.op == op)


def find_algorithm(task: Task, plan: Plan) -> Algorithm:
    """The algorithm of a plan. Raises UsageError where it cannot do this task."""
    algorithm = ALGORITHMS.get((task.op, plan.algorithm))
    if algorithm is None:
        names = ", ".join(a.name for a in algorithms_of(task.op))
        raise UsageError(f"{task.op} has no algorithm '{plan.algorithm}': give one of {names}")
    reason = unfit(algorithm, task, plan)
    if reason:
        raise UsageError(f"{task.op} by {algorithm.name}: {reason}")
    return algorithm


def unfit(algorithm: Algorithm, task: Task, plan: Plan) -> str | None:
    """Why an algorithm cannot do a task as planned; None if it can."""
    if task.counts and not algorithm.takes_sizes:
        return "it cannot have blocks of given sizes"
    is_split = algorithm.needs_hosts or (algorithm.needs_grid and not plan.width)
    if is_split and task.ranks % plan.hosts:
        return f"{task.ranks} ranks cannot be spread evenly over {plan.hosts} hosts"
    if algorithm.needs_grid and task.ranks % torus.row_length(task.ranks, plan):
        return f"{task.ranks} ranks cannot stand in rows of {plan.width}"
    if plan.order and sorted(plan.order) != list(range(task.ranks)):
        return f"the order must name each of the ranks 0 to {task.ranks - 1} once"
    return None


def write_records(task: Task, plan: Plan, rank: int) -> tuple[tuple[Buffer, ...], list[Record]]:
    """The buffers of a rank and its steps before dependencies are found. Raises UsageError."""
    algorithm = find_algorithm(task, plan)
    if not 0 <= rank < task.ranks:
        raise UsageError(f"{task.op}: no rank {rank} among {task.ranks}")
    if plan.order and not algorithm.has_places:
        plan = replace(plan, order=())
    if task.op == "barrier":
        plan = replace(plan, slices=1)
    write = Writer(task, plan, rank, is_streaming=algorithm.is_streaming)
    place = plan.order.index(rank) if plan.order else rank
    for index in range(plan.slices):
        write.start_slice(index)
        algorithm.write(Scope(task, plan, place, index), write)
    return tuple(write.buffers), write.records()


def write_rank(task: Task, plan: Plan, rank: int) -> RankProgram:
    """What one rank has and does, without the others'. Raises UsageError."""
    buffers, records = write_records(task, plan, rank)
    after = dependencies(records)
    steps = tuple(make_step(record, a) for record, a in zip(records, after, strict=True))
    return RankProgram(rank, buffers, steps)


def write_program(task: Task, plan: Plan) -> Program:
    """The program of all ranks. Raises UsageError."""
    return Program(task, plan, tuple(write_rank(task, plan, rank) for rank in range(task.ranks)))

"""How long a task takes as planned: every rank simulated, or one host for all."""

from collections.abc import Callable
from dataclasses import replace

from tokenmill.collectives.algorithms.torus import row_length
from tokenmill.collectives.events import Events, Simulated, Transfer
from tokenmill.collectives.outline import Outline, is_symmetric
from tokenmill.collectives.program import Plan
from tokenmill.collectives.task import Task
from tokenmill.collectives.topology import Topology
from tokenmill.errors import CapacityError

MOST_STEPS = 12_000_000
"""Steps that fit into memory and patience."""
_FEW_STEPS = 200_000
_RING_HOSTS = 96


def simulate(
    task: Task,
    plan: Plan,
    topology: Topology,
    num_bytes: float,
    *,
    is_exact: bool | None = None,
    on_transfer: Callable[[Transfer], None] | None = None,
) -> Simulated:
    """Run a task as planned, with a vector of `num_bytes`.

    The task's own number of elements does not matter: elements are taken to be so small that all
    blocks are of one size. `is_exact` simulates every rank, or lets one host stand for all where
    that is the same; by default whichever is quick. Raises UsageError, and CapacityError for too
    large a case.
    """
    task, itemsize = _divisible(task, plan, num_bytes)
    is_alike = is_symmetric(task, plan, topology)
    if is_exact is None:
        is_exact = task.ranks * steps_estimate(task, plan) <= _FEW_STEPS
    is_exact = is_exact or not is_alike
    ranks = range(task.ranks) if is_exact else topology.members(0)
    estimate = task.ranks * steps_estimate(task, plan)
    if not is_exact:
        estimate = num_simulated_steps(task, plan, topology)
    if estimate > MOST_STEPS:
        raise CapacityError(
            f"{plan.algorithm} over {task.ranks} ranks takes about {estimate:,} steps, too many to "
            "simulate: take fewer ranks"
        )
    if not is_exact and plan.algorithm == "ring" and topology.hosts > 2 * _RING_HOSTS:
        return _long_ring(task, plan, topology, num_bytes)
    outline = Outline(task, plan, ranks, topology)
    return Events(outline, topology, itemsize, is_exact, on_transfer).run()


def _long_ring(task: Task, plan: Plan, topology: Topology, num_bytes: float) -> Simulated:
    """A long ring from two shorter ones with messages of the same size.

    One host stands for all, and each round is like the one before: after a few rounds the times
    repeat with a fixed period (the system is linear in max and plus), so that time grows evenly
    with the number of rounds.
    """

    def run(hosts: int) -> Simulated:
        ranks = hosts * topology.ranks_per_host
        return simulate(
            replace(task, ranks=ranks),
            plan,
            replace(topology, ranks=ranks, hosts=hosts),
            num_bytes * ranks / task.ranks,
            is_exact=False,
        )

    short, longer = run(_RING_HOSTS), run(2 * _RING_HOSTS)
    periods = (topology.hosts - 2 * _RING_HOSTS) / _RING_HOSTS

    def extend(name: str) -> float:
        there: float = getattr(longer, name)
        before: float = getattr(short, name)
        return there + periods * (there - before)

    per_rank = longer.num_messages / longer.num_steps / (2 * _RING_HOSTS)
    num_steps = round(extend("num_steps"))
    return Simulated(
        time_s=extend("time_s"),
        num_steps=num_steps,
        num_messages=round(per_rank * num_steps * topology.hosts),
        bytes_sent=extend("bytes_sent"),
        uplink_bytes=extend("uplink_bytes"),
        is_exact=False,
    )


def num_simulated_steps(task: Task, plan: Plan, topology: Topology) -> int:
    """About how many steps a simulation takes at least."""
    if not is_symmetric(task, plan, topology):
        return task.ranks * steps_estimate(task, plan)
    if plan.algorithm == "ring" and topology.hosts > 2 * _RING_HOSTS:
        return 12 * topology.ranks_per_host**2 * _RING_HOSTS
    return topology.ranks_per_host * steps_estimate(task, plan)


def _divisible(task: Task, plan: Plan, num_bytes: float) -> tuple[Task, float]:
    """The task with so many elements that every cut is even, and the bytes of one of them."""
    if task.op == "barrier":
        return task, 1.0
    if task.counts:
        return task, num_bytes / max(1, task.count)
    count = plan.slices * _even_parts(task, plan)
    return replace(task, count=count), num_bytes / count


def _even_parts(task: Task, plan: Plan) -> int:
    """Into how many equal parts an algorithm cuts a slice."""
    if plan.algorithm == "recursive_doubling" and task.op == "all_reduce":
        return 1
    if plan.algorithm == "tree":
        return 2
    if plan.algorithm == "rabenseifner" and task.op == "all_reduce":
        return 2 * task.ranks
    return task.ranks * (4 if plan.algorithm == "torus" else 1)


def steps_estimate(task: Task, plan: Plan) -> int:
    """About how many steps a rank has."""
    p = task.ranks
    if plan.algorithm == "ring" and task.op in ("broadcast", "reduce"):
        steps = 2
    elif plan.algorithm in ("ring", "one_shot", "two_shot", "bruck"):
        steps = 4 * p
    elif plan.algorithm in ("hierarchical", "leader"):
        steps = 4 * (plan.hosts + p // plan.hosts)
    elif plan.algorithm == "torus":
        width = row_length(p, plan)
        steps = 16 * (width + p // width)
    elif plan.algorithm == "tree":
        steps = 12
    else:
        steps = 4 * p.bit_length()
    return steps * plan.slices

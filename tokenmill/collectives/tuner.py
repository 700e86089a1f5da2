"""Which algorithm, and in how many slices: the one that costs least by formula, and why.

`choose` compares every algorithm that can do the task on the topology. A caller can demand results
in order of rank (`is_ordered`), name the algorithm or the number of slices itself, or leave that to
the user: the variable TOKENMILL_COLLECTIVES overrides, as in `all_reduce=ring,broadcast=tree/8`
(after the slash, slices).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from tokenmill.collectives.catalog import ALGORITHMS, Algorithm, algorithms_of, unfit
from tokenmill.collectives.cost import Cost, predict
from tokenmill.collectives.program import Plan
from tokenmill.collectives.task import OPS, Task
from tokenmill.collectives.topology import Topology
from tokenmill.collectives.words import size_words, time_words
from tokenmill.errors import UsageError

VARIABLE = "TOKENMILL_COLLECTIVES"
_SLICES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_PIPELINED = ("tree",)
"""Besides streams, what gains from slices."""
_LEAST_SLICE_BYTES = 1024


@dataclass(frozen=True, kw_only=True)
class Candidate:
    plan: Plan
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The plan, what it costs, what else there was (cheapest first), and the reason in words."""

    plan: Plan
    cost: Cost
    others: tuple[Candidate, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Override:
    """What a user wants; None leaves it to the tuner."""

    algorithm: str | None = None
    slices: int | None = None


def choose(
    task: Task,
    topology: Topology,
    num_bytes: float,
    *,
    override: Override | None = None,
    is_ordered: bool = False,
) -> Choice:
    """The cheapest plan. Raises UsageError where what is demanded cannot be had."""
    override = override or Override()
    candidates = sorted(
        _candidates(task, topology, num_bytes, override, is_ordered),
        key=lambda candidate: candidate.cost.time_s,
    )
    if not candidates:
        raise UsageError(_nothing_fits(task, topology, override, is_ordered))
    best, *others = candidates
    reason = _reason(task, best, others, num_bytes, override)
    return Choice(plan=best.plan, cost=best.cost, others=tuple(others), reason=reason)


def parse_overrides(text: str) -> Mapping[str, Override]:
    """`all_reduce=ring,broadcast=tree/8` for each operation. Raises UsageError."""
    found = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        op, _, wanted = word.partition("=")
        name, slash, slices = wanted.partition("/")
        if op not in OPS or not name:
            raise UsageError(
                f"{VARIABLE} has {word!r}, but must be like all_reduce=ring,reduce=tree/8"
            )
        if (op, name) not in ALGORITHMS:
            names = ", ".join(a.name for a in algorithms_of(op))
            raise UsageError(f"{VARIABLE}: {op} has no algorithm {name!r}: give one of {names}")
        if slash and not (slices.isdecimal() and int(slices) > 0):
            raise UsageError(f"{VARIABLE} has {slices!r} slices in {word!r}: give a number above 0")
        found[op] = Override(algorithm=name, slices=int(slices) if slash else None)
    return found


def _candidates(
    task: Task, topology: Topology, num_bytes: float, override: Override, is_ordered: bool
) -> Iterator[Candidate]:
    for algorithm in algorithms_of(task.op):
        if override.algorithm not in (None, algorithm.name):
            continue
        if is_ordered and task.is_reducing and not algorithm.is_ordered:
            continue
        if _is_pointless(algorithm, topology) and override.algorithm is None:
            continue
        plan = Plan(algorithm=algorithm.name, hosts=topology.hosts, slices=override.slices or 1)
        if unfit(algorithm, task, plan) is None:
            if override.slices is None:
                plan = with_best_slices(task, plan, topology, num_bytes)
            yield Candidate(plan=plan, cost=predict(task, plan, topology, num_bytes))


def with_best_slices(
    task: Task,
    plan: Plan,
    topology: Topology,
    num_bytes: float,
    *,
    is_allowed: Callable[[Plan], bool] = lambda plan: True,
) -> Plan:
    """The plan with as many slices as make it cheapest, where it gains from them."""
    algorithm = ALGORITHMS[task.op, plan.algorithm]
    if not (algorithm.is_streaming or algorithm.name in _PIPELINED):
        return plan
    plans = [
        replace(plan, slices=slices)
        for slices in _SLICES
        if slices == 1 or num_bytes / slices >= _LEAST_SLICE_BYTES
    ]
    return min(
        (sliced for sliced in plans if sliced.slices == 1 or is_allowed(sliced)),
        key=lambda sliced: predict(task, sliced, topology, num_bytes).time_s,
    )


def _is_pointless(algorithm: Algorithm, topology: Topology) -> bool:
    """Two levels where there is one, or ranks whose numbers do not follow the hosts."""
    if algorithm.needs_hosts:
        return topology.hosts == 1 or topology.ranks_per_host == 1 or topology.is_interleaved
    return algorithm.needs_grid and topology.is_interleaved


def _nothing_fits(task: Task, topology: Topology, override: Override, is_ordered: bool) -> str:
    names = ", ".join(a.name for a in algorithms_of(task.op) if a.is_ordered or not is_ordered)
    wanted = f"algorithm '{override.algorithm}'" if override.algorithm else "algorithm"
    demand = " in order of rank" if is_ordered else ""
    where = f"{topology.ranks} ranks on {topology.hosts} hosts"
    return f"{task.op}{demand} has no {wanted} for {where}: give one of {names}"


def _reason(
    task: Task, best: Candidate, others: list[Candidate], num_bytes: float, override: Override
) -> str:
    cost = best.cost
    parts = {
        "latency": cost.latency_s,
        "bytes": cost.transfer_s,
        "sums": cost.reduction_s,
    }
    shares = ", ".join(
        f"{name} {time_words(seconds)}" for name, seconds in parts.items() if seconds
    )
    slices = f" in {best.plan.slices} slices" if best.plan.slices > 1 else ""
    size = "" if task.op == "barrier" else f" of {size_words(num_bytes)}"
    start = f"{task.op}{size} by {best.plan.algorithm}{slices}: {time_words(cost.time_s)}"
    details = f" ({shares})" if shares else ""
    if override.algorithm is not None:
        return f"{start}{details}, as demanded"
    if not others:
        return f"{start}{details}; nothing else fits"
    return f"{start}{details}; next is {_comparison(best, others[0])}"


def _comparison(best: Candidate, other: Candidate) -> str:
    """The runner-up, and what makes it slower."""
    mine, its = best.cost, other.cost
    differences = {
        f"its {its.num_steps} steps": its.latency_s - mine.latency_s,
        "the bytes on its busiest link": its.transfer_s - mine.transfer_s,
        "its sums": its.reduction_s - mine.reduction_s,
    }
    worst = max(differences, key=lambda name: differences[name])
    because = f", for {worst}" if differences[worst] > 0 else ""
    return f"{other.plan.algorithm} with {time_words(its.time_s)}{because}"

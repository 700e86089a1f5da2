"""All algorithms of an operation side by side, at one size and over sizes and numbers of ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tokenmill.collectives.bandwidth import bus_bandwidth
from tokenmill.collectives.catalog import algorithms_of, find_algorithm, unfit
from tokenmill.collectives.cost import Cost, predict
from tokenmill.collectives.nccl import MODELLED, nccl_latency_s
from tokenmill.collectives.program import Plan
from tokenmill.collectives.simulate import num_simulated_steps, simulate
from tokenmill.collectives.task import Task
from tokenmill.collectives.topology import Topology
from tokenmill.collectives.tuner import with_best_slices
from tokenmill.errors import UsageError

QUICK_STEPS = 400_000
"""What is simulated without being asked for; the rest is computed by formula."""
EVERY_RANK, ONE_HOST, FORMULA = "every rank", "one host for all", "formula"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One algorithm. Bytes are those of the busiest rank or host, one way."""

    algorithm: str
    slices: int
    num_steps: int
    bytes_sent: float
    uplink_bytes: float | None
    """None where it was not simulated."""
    time_s: float
    formula_s: float
    busbw: float
    """Bytes a second, as nccl-tests count them."""
    nccl_latency_s: float | None
    """NCCL's own model of the latency, where it has one."""
    source: str
    """EVERY_RANK or ONE_HOST if simulated, else FORMULA."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared.

    `simulates` None: what is quick; True: all; False: nothing. `is_exact`: every rank, where one
    host could stand for all, too. `slices` None: as many as make an algorithm cheapest, as long as
    that can still be simulated.
    """

    task: Task
    topology: Topology
    plans: tuple[Plan, ...]
    simulates: bool | None = None
    is_exact: bool = False
    slices: int | None = None

    def rows(self, num_bytes: float) -> Iterator[Row]:
        """One for each plan. Raises CapacityError for what is too large to simulate."""
        for plan in self.plans:
            yield self._row(plan, num_bytes)

    def _row(self, plan: Plan, num_bytes: float) -> Row:
        task, topology = self.task, self.topology
        plan = self._sliced(task, plan, topology, num_bytes)
        cost = predict(task, plan, topology, num_bytes)
        num_steps, sent, time_s = cost.num_steps, cost.bytes_sent, cost.time_s
        uplink: float | None = None
        source = FORMULA
        if self.simulates or (self.simulates is None and self._is_quick(plan)):
            done = simulate(task, plan, topology, num_bytes, is_exact=self.is_exact or None)
            num_steps, sent, time_s = done.num_steps, done.bytes_sent, done.time_s
            uplink = done.uplink_bytes
            source = EVERY_RANK if done.is_exact else ONE_HOST
        return Row(
            algorithm=plan.algorithm,
            slices=plan.slices,
            num_steps=num_steps,
            bytes_sent=sent,
            uplink_bytes=uplink,
            time_s=time_s,
            formula_s=cost.time_s,
            busbw=bus_bandwidth(task, num_bytes, time_s),
            nccl_latency_s=self._nccl(plan),
            source=source,
        )

    def _is_quick(self, plan: Plan) -> bool:
        return num_simulated_steps(self.task, plan, self.topology) <= QUICK_STEPS

    def _sliced(self, task: Task, plan: Plan, topology: Topology, num_bytes: float) -> Plan:
        if self.slices is not None:
            return replace(plan, slices=self.slices)
        if self.simulates is False:
            return with_best_slices(task, plan, topology, num_bytes)
        return with_best_slices(task, plan, topology, num_bytes, is_allowed=self._is_quick)

    def _formula(self, task: Task, plan: Plan, topology: Topology, num_bytes: float) -> Cost:
        return predict(task, self._sliced(task, plan, topology, num_bytes), topology, num_bytes)

    def _nccl(self, plan: Plan) -> float | None:
        ops = {"ring": ("all_reduce", "reduce_scatter", "all_gather"), "tree": ("all_reduce",)}
        if plan.algorithm in MODELLED and self.task.op in ops[plan.algorithm]:
            return nccl_latency_s(self.task, plan.algorithm, self.topology)
        return None

    def over_sizes(self, sizes: Sequence[float]) -> dict[str, list[tuple[float, float]]]:
        """By formula: for each algorithm (bytes, seconds)."""
        return {
            plan.algorithm: [
                (size, self._formula(self.task, plan, self.topology, size).time_s) for size in sizes
            ]
            for plan in self.plans
        }

    def over_ranks(self, num_bytes: float) -> dict[str, list[tuple[int, int, float]]]:
        """By formula: for each algorithm (ranks, steps, seconds) with 1, 2, 4 ... of the hosts."""
        found: dict[str, list[tuple[int, int, float]]] = {plan.algorithm: [] for plan in self.plans}
        for ranks in self._numbers_of_ranks():
            topology = self._at_ranks(ranks)
            task = replace(self.task, ranks=ranks, root=0, peer=min(self.task.peer, ranks - 1))
            for plan in self.plans:
                here = replace(plan, hosts=topology.hosts, width=0)
                if unfit(find_algorithm(self.task, plan), task, here) is None:
                    cost = self._formula(task, here, topology, num_bytes)
                    found[plan.algorithm].append((ranks, cost.num_steps, cost.time_s))
        return found

    def _numbers_of_ranks(self) -> list[int]:
        most, unit = self.topology.ranks, self.topology.ranks_per_host
        if self.topology.hosts == 1:
            unit = 1
        numbers = {unit << shift for shift in range(most.bit_length()) if unit << shift <= most}
        return sorted(number for number in numbers | {most} if number > 1)

    def _at_ranks(self, ranks: int) -> Topology:
        if self.topology.hosts == 1:
            return replace(self.topology, ranks=ranks)
        return replace(self.topology, ranks=ranks, hosts=ranks // self.topology.ranks_per_host)


def make_plans(
    task: Task,
    topology: Topology,
    *,
    algorithms: Sequence[str] = (),
    width: int = 0,
) -> tuple[Plan, ...]:
    """A plan for each algorithm that can do the task, or for those named. Raises UsageError."""
    known = [a.name for a in algorithms_of(task.op)]
    for name in algorithms:
        if name not in known:
            raise UsageError(
                f"{task.op} has no algorithm '{name}': give some of {', '.join(known)}"
            )
    plans = []
    for algorithm in algorithms_of(task.op):
        if algorithms and algorithm.name not in algorithms:
            continue
        plan = Plan(algorithm=algorithm.name, hosts=topology.hosts, width=width)
        if algorithms:
            find_algorithm(task, plan)
        is_idle = algorithm.needs_hosts and topology.hosts == 1 and not algorithms
        if not is_idle and unfit(algorithm, task, plan) is None:
            plans.append(plan)
    return tuple(plans)

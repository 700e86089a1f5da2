"""How long a program takes, event by event, on the links of a topology.

Steps run by dependencies. A message leaves when its step is ready, its link free and its port out
free; it is served at each port and shared link in the order in which messages come there, and comes
in alpha + n * beta after it was served last. Reductions of a rank follow one another. Copies and
waking up cost nothing.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace

from tokenmill.collectives.outline import Outline, is_symmetric
from tokenmill.collectives.program import Plan
from tokenmill.collectives.task import Task
from tokenmill.collectives.topology import Link, Topology
from tokenmill.collectives.writer import RECV_REDUCE, REDUCE, SEND
from tokenmill.errors import CapacityError

MOST_STEPS = 12_000_000
"""Steps that fit into memory and patience."""
_FEW_STEPS = 200_000


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What came out. Bytes are those of the rank or host that has most."""

    time_s: float
    num_steps: int
    """Messages on the longest chain of which each waits for the one before."""
    num_messages: int
    bytes_sent: int
    uplink_bytes: int
    """Leaving one host; as many enter one."""
    is_exact: bool
    """Every rank was simulated; otherwise one host stood for all."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A message under way."""

    source: int
    target: int
    num_bytes: int
    start_s: float
    stop_s: float


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
    estimate = len(ranks) * steps_estimate(task, plan)
    if estimate > MOST_STEPS:
        raise CapacityError(
            f"{plan.algorithm} over {task.ranks} ranks takes about {estimate:,} steps, too many to "
            "simulate: take fewer ranks"
        )
    outline = Outline(task, plan, ranks, topology)
    return _Simulation(outline, topology, itemsize, is_exact, on_transfer).run()


def num_simulated_steps(task: Task, plan: Plan, topology: Topology) -> int:
    """About how many steps a simulation takes at least."""
    is_alike = is_symmetric(task, plan, topology)
    ranks = topology.ranks_per_host if is_alike else task.ranks
    return ranks * steps_estimate(task, plan)


def _divisible(task: Task, plan: Plan, num_bytes: float) -> tuple[Task, float]:
    """The task with so many elements that every cut is even, and the bytes of one of them."""
    if task.op == "barrier":
        return task, num_bytes
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
    p, few = task.ranks, 4 * task.ranks.bit_length()
    if plan.algorithm == "ring" and task.op in ("broadcast", "reduce"):
        steps = 2
    elif plan.algorithm in ("ring", "one_shot", "two_shot"):
        steps = 4 * p
    elif plan.algorithm in ("hierarchical", "leader"):
        steps = 4 * (plan.hosts + p // plan.hosts)
    elif plan.algorithm == "torus":
        steps = 16 * (plan.width or 2 * int(p**0.5) + p // max(1, plan.hosts))
    else:
        steps = few
    return steps * plan.slices


class _Simulation:
    """The state of ports and links, and the loop over events."""

    def __init__(
        self,
        outline: Outline,
        topology: Topology,
        itemsize: float,
        is_exact: bool,
        on_transfer: Callable[[Transfer], None] | None,
    ) -> None:
        self._outline, self._topology, self._itemsize = outline, topology, itemsize
        self._is_exact, self._on_transfer = is_exact, on_transfer
        num_ranks = len(outline.ranks)
        self._out_free = [0.0] * num_ranks
        self._in_free = [0.0] * num_ranks
        self._link_free = [0.0] * len(outline.links)
        uplinks = [self._uplink_of(rank) for rank in outline.ranks]
        self._up_free = [0.0] * (max(uplinks) + 1)
        self._down_free = [0.0] * (max(uplinks) + 1)
        local, remote = topology.links.local, topology.links.remote
        self._links = [
            (source, target, uplinks[source], uplinks[target], *_constants(remote, itemsize))
            if is_remote
            else (source, target, -1, -1, *_constants(local, itemsize))
            for source, target, is_remote in outline.links
        ]

    def _uplink_of(self, rank: int) -> int:
        topology = self._topology
        return topology.host(rank) * topology.uplinks + topology.local_rank(rank) % topology.uplinks

    def run(self) -> Simulated:
        """The loop: the earliest step that is ready goes next, and may make others ready."""
        outline = self._outline
        kinds, followers, waits = outline.kind, outline.followers, outline.waits
        next_send, partner = outline.next_send, outline.partner
        gamma = self._topology.links.gamma_s_per_byte * self._itemsize
        reducer_free = [0.0] * len(outline.ranks)
        ready, depth = [0.0] * len(kinds), [0] * len(kinds)
        heap = [(0.0, step) for step, count in enumerate(waits) if not count]
        end, num_done, push, pop = 0.0, 0, heapq.heappush, heapq.heappop
        while heap:
            now, step = pop(heap)
            num_done += 1
            kind, level = kinds[step], depth[step]
            if kind == SEND:
                asked = now
                now, arrival = self._transfer(step, now)
                for other, at_s in ((partner[step], arrival), (next_send[step], asked)):
                    if other < 0:
                        continue
                    ready[other] = max(ready[other], at_s)
                    depth[other] = max(depth[other], level + 1)
                    waits[other] -= 1
                    if not waits[other]:
                        push(heap, (ready[other], other))
            elif kind in (RECV_REDUCE, REDUCE):
                rank = outline.owner[step]
                now = max(now, reducer_free[rank]) + outline.count[step] * gamma
                reducer_free[rank] = now
            if now > end:
                end = now
            for other in followers[step]:
                if now > ready[other]:
                    ready[other] = now
                if level > depth[other]:
                    depth[other] = level
                waits[other] -= 1
                if not waits[other]:
                    push(heap, (ready[other], other))
        assert num_done == len(kinds), "deadlock in a simulated program"
        return self._summary(end, max(depth, default=0))

    def _transfer(self, step: int, now: float) -> tuple[float, float]:
        """Send at `now` or as soon as there is room: when it has left, and when it is there."""
        number, count = self._outline.link[step], self._outline.count[step]
        source, target, up, down, alpha_s, gap_s, overhead_s, beta_s = self._links[number]
        busy_s = count * beta_s
        start = max(now, self._link_free[number], self._out_free[source])
        left = start + busy_s
        self._out_free[source] = left + overhead_s
        self._link_free[number] = left + gap_s
        served = start
        if up >= 0:
            served = max(served, self._up_free[up])
            self._up_free[up] = served + busy_s
            served = max(served, self._down_free[down])
            self._down_free[down] = served + busy_s
        served = max(served, self._in_free[target])
        self._in_free[target] = served + busy_s + overhead_s
        arrival = served + alpha_s + busy_s
        if self._on_transfer:
            self._on_transfer(
                Transfer(
                    source=self._outline.ranks[source],
                    target=self._outline.ranks[target],
                    num_bytes=round(count * self._itemsize),
                    start_s=start,
                    stop_s=arrival,
                )
            )
        return left, arrival

    def _summary(self, end: float, num_steps: int) -> Simulated:
        outline, topology = self._outline, self._topology
        sent = [0] * len(outline.ranks)
        leaving: dict[int, int] = {}
        num_messages = 0
        for step, kind in enumerate(outline.kind):
            if kind != SEND:
                continue
            num_messages += 1
            source, _, is_remote = outline.links[outline.link[step]]
            sent[source] += outline.count[step]
            if is_remote:
                host = topology.host(outline.ranks[source])
                leaving[host] = leaving.get(host, 0) + outline.count[step]
        return Simulated(
            time_s=end,
            num_steps=num_steps,
            num_messages=num_messages * (1 if self._is_exact else topology.hosts),
            bytes_sent=round(max(sent) * self._itemsize),
            uplink_bytes=round(max(leaving.values(), default=0) * self._itemsize),
            is_exact=self._is_exact,
        )


def _constants(link: Link, itemsize: float) -> tuple[float, float, float, float]:
    """alpha, gap, overhead, and seconds for each element."""
    return link.alpha_s, link.busy_s, link.overhead_s, link.beta_s_per_byte * itemsize

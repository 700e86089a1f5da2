"""What an algorithm costs by formula: alpha for each step, beta for each byte, gamma for each sum.

The simulator knows the same constants and more (who waits for whom); formulas answer in
microseconds and say what the time consists of, which is what a tuner needs. Symbols: p ranks, h
hosts of m ranks, n bytes, k slices. Of a ring with r of its L links between hosts, a step takes
what the slowest link needs for its message, and at least the mean over the links, since every block
passes all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from tokenmill.collectives.algorithms.torus import row_length
from tokenmill.collectives.program import Plan
from tokenmill.collectives.task import Task
from tokenmill.collectives.topology import Link, Topology
from tokenmill.collectives.tree_shape import tree_shape


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds, split by what they depend on; `num_steps` and `bytes_sent` as the table has them."""

    num_steps: int
    bytes_sent: float
    latency_s: float
    transfer_s: float
    reduction_s: float

    @property
    def time_s(self) -> float:
        return self.latency_s + self.transfer_s + self.reduction_s

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            num_steps=self.num_steps + other.num_steps,
            bytes_sent=self.bytes_sent + other.bytes_sent,
            latency_s=self.latency_s + other.latency_s,
            transfer_s=self.transfer_s + other.transfer_s,
            reduction_s=self.reduction_s + other.reduction_s,
        )


NOTHING = Cost(num_steps=0, bytes_sent=0.0, latency_s=0.0, transfer_s=0.0, reduction_s=0.0)


class Costs:
    """The formulas, for one topology and one number of slices."""

    def __init__(self, topology: Topology, plan: Plan) -> None:
        self.topology, self.plan = topology, plan
        self.p, self.h, self.m = topology.ranks, topology.hosts, topology.ranks_per_host
        self.local, self.remote = topology.links.local, topology.links.remote
        self.gamma = topology.links.gamma_s_per_byte
        self.flows = topology.flows_per_uplink
        self.k = plan.slices

    # -- parts

    def steps(
        self, count: int, num_bytes: float, link: Link, *, flows: int = 1, sums: bool = False
    ) -> Cost:
        """So many steps, each with a message that shares its link with flows - 1 others."""
        return Cost(
            num_steps=count,
            bytes_sent=count * num_bytes,
            latency_s=count * link.alpha_s,
            transfer_s=count * num_bytes * flows * link.beta_s_per_byte,
            reduction_s=count * num_bytes * self.gamma if sums else 0.0,
        )

    def ring(
        self,
        length: int,
        num_remote: int,
        num_bytes: float,
        *,
        flows: int = 1,
        lanes: int = 1,
        sums: bool = False,
    ) -> Cost:
        """Once around a ring: length - 1 steps with num_bytes each, in so many messages (lanes)."""
        count = length - 1
        if count < 1:
            return NOTHING
        num_local = length - num_remote
        near, far = self.local, self.remote
        near_s = num_bytes * near.beta_s_per_byte
        far_s = num_bytes * flows * far.beta_s_per_byte
        overhead = max(
            (lanes - 1) * near.overhead_s if num_local else 0.0,
            (lanes - 1) * far.overhead_s if num_remote else 0.0,
        )
        mean_alpha = (num_local * near.alpha_s + num_remote * far.alpha_s) / length
        slowest = max(near_s if num_local else 0.0, far_s if num_remote else 0.0)
        busy = max(
            near.busy_s if num_local else 0.0,
            far.busy_s if num_remote else 0.0,
        )
        return Cost(
            num_steps=count,
            bytes_sent=count * num_bytes,
            latency_s=count * (max(mean_alpha, busy) + overhead),
            transfer_s=count * slowest,
            reduction_s=count * num_bytes * self.gamma if sums else 0.0,
        )

    def ring_of_all(self, num_bytes: float, *, sums: bool = False) -> Cost:
        if self.h == 1:
            return self.ring(self.p, 0, num_bytes, sums=sums)
        if self.topology.is_interleaved:
            return self.ring(self.p, self.p, num_bytes, flows=self.flows, sums=sums)
        return self.ring(self.p, self.h, num_bytes, sums=sums)

    def chain(self, num_bytes: float, *, sums: bool = False) -> Cost:
        """All p - 1 hops with the first of k slices, then the others behind it."""
        if self.p == 1:
            return NOTHING
        num_far = self.p - 1 if self.topology.is_interleaved and self.h > 1 else self.h - 1
        per_slice = num_bytes / self.k
        first = self.steps(self.p - 1 - num_far, per_slice, self.local, sums=sums)
        first += self.steps(num_far, per_slice, self.remote, sums=sums)
        slowest = self.remote if num_far else self.local
        rest = self.k - 1
        return Cost(
            num_steps=self.p + self.k - 2,
            bytes_sent=num_bytes,
            latency_s=first.latency_s + rest * slowest.busy_s,
            transfer_s=first.transfer_s + rest * per_slice * slowest.beta_s_per_byte,
            reduction_s=first.reduction_s,
        )

    def exchange(self, num_bytes: float, *, sums: bool) -> Cost:
        """Everyone sends num_bytes to everyone else, all at once."""
        near, far = self.m - 1, self.p - self.m
        latency = self.remote.alpha_s if far else self.local.alpha_s * (near > 0)
        near_s = near * (num_bytes * self.local.beta_s_per_byte + self.local.overhead_s)
        far_s = far * (num_bytes * self.remote.beta_s_per_byte + self.remote.overhead_s)
        shared_s = self.flows * far * num_bytes * self.remote.beta_s_per_byte
        return Cost(
            num_steps=1 if self.p > 1 else 0,
            bytes_sent=(self.p - 1) * num_bytes,
            latency_s=latency,
            transfer_s=max(near_s + far_s, shared_s),
            reduction_s=self._ordered_sum(num_bytes) if sums else 0.0,
        )

    def _ordered_sum(self, num_bytes: float) -> float:
        return (self.p - 1) * num_bytes * self.gamma

    def star(self, num_bytes: float, *, sums: bool) -> Cost:
        """The root sends num_bytes to each of the others, or hears from each."""
        near, far = self.m - 1, self.p - self.m
        near_s = near * (num_bytes * self.local.beta_s_per_byte + self.local.overhead_s)
        far_s = far * (num_bytes * self.remote.beta_s_per_byte + self.remote.overhead_s)
        return Cost(
            num_steps=1 if self.p > 1 else 0,
            bytes_sent=(1 if sums else self.p - 1) * num_bytes if self.p > 1 else 0.0,
            latency_s=self.remote.alpha_s if far else self.local.alpha_s * (near > 0),
            transfer_s=near_s + far_s,
            reduction_s=self._ordered_sum(num_bytes) if sums else 0.0,
        )

    def doubling(self, num_bytes: Callable[[int], float], *, sums: bool) -> Cost:
        """A step with the partner at each distance 1, 2, 4 ...; the message depends on it."""
        total = NOTHING
        core = 1 << (self.p.bit_length() - 1)
        extra = self.p > core
        is_aligned = not extra and self.m & (self.m - 1) == 0
        distance = 1
        while distance < core:
            far = self.h > 1 and (not is_aligned or distance >= self.m)
            # Of partners nearer than a host is wide, only those at its ends are on another.
            flows = min(self.flows, distance * (1 + extra))
            link, flows = (self.remote, flows) if far else (self.local, 1)
            total += self.steps(1, num_bytes(distance), link, flows=flows, sums=sums)
            distance *= 2
        return total

    def dissemination(self) -> Cost:
        """A message to the place 1, 2, 4 ... further on."""
        total, distance = NOTHING, 1
        while distance < self.p:
            total += self.steps(1, 0.0, self.remote if self.h > 1 else self.local)
            distance *= 2
        return total

    def bruck(self, num_bytes: float) -> Cost:
        """To the place 1, 2, 4 ... further on, all blocks of num_bytes that go on by so much."""
        total, distance = NOTHING, 1
        while distance < self.p:
            num_blocks = sum(1 for slot in range(self.p) if slot & distance)
            link, flows = self.local, 1
            if self.h > 1:
                link, flows = self.remote, min(self.flows, distance)
            total += self.steps(1, num_blocks * num_bytes, link, flows=flows)
            distance *= 2
        # Without all bits in use no block travels in all steps, so no chain has them all.
        return replace(total, num_steps=self.p.bit_length() - 1)

    def trees(self, num_bytes: float, *, both_ways: bool, sums: bool) -> Cost:
        """Along both trees with half the vector each, k slices in a pipeline."""
        width = 1 if self.topology.is_interleaved else self.m
        shape = tree_shape(self.p if both_ways else max(1, self.p - 1), width, self.h)
        if not both_ways and self.p > 1:
            shape = shape.below_a_root(is_far=self.h > 1)
        ways = 2 if both_ways else 1
        half = num_bytes / 2
        slowest = self.remote if self.h > 1 else self.local
        latency = ways * (
            shape.local_hops * self.local.alpha_s + shape.remote_hops * self.remote.alpha_s
        )
        first = (
            2
            * ways
            * (  # two children, one after the other
                shape.local_hops * self.local.beta_s_per_byte
                + shape.remote_hops * self.remote.beta_s_per_byte
            )
        )
        port = (shape.port_messages if both_ways else 2) * half * slowest.beta_s_per_byte
        shared = shape.uplink_messages * half / self.topology.uplinks
        shared_s = shared * self.remote.beta_s_per_byte if self.h > 1 else 0.0
        rest = (self.k - 1) / self.k * max(port, shared_s)
        return Cost(
            num_steps=ways * shape.hops,
            bytes_sent=shape.port_messages * half if both_ways else num_bytes,
            latency_s=latency + (self.k - 1) * slowest.busy_s,
            transfer_s=first * half / self.k + rest,
            reduction_s=num_bytes * self.gamma if sums else 0.0,
        )


def _all_gather(costs: Costs, name: str, n: float, *, sums: bool) -> Cost:
    """All-gather, or with sums reduce-scatter: the same messages the other way round."""
    p, h, m = costs.p, costs.h, costs.m
    if name == "ring":
        return costs.ring_of_all(n / p, sums=sums)
    if name == "hierarchical":
        hosts = costs.plan.hosts
        width = p // hosts
        between = costs.ring(hosts, hosts if h > 1 else 0, n / p, flows=costs.flows, sums=sums)
        return costs.ring(width, 0, n / width, sums=sums) + between
    if name == "torus":
        return _torus(costs, n, sums=sums)
    if name == "one_shot":
        return costs.exchange(n / p, sums=sums)
    core = 1 << (p.bit_length() - 1)
    total = costs.doubling(lambda distance: n * distance / core, sums=sums)
    if p > core:  # those without a partner hand over before and are told after
        link = costs.remote if m == 1 and h > 1 else costs.local
        before, after = (n, n / p) if sums else (n / p, n)
        total += costs.steps(1, before, link, sums=sums) + costs.steps(1, after, link)
    return total


def _torus(costs: Costs, n: float, *, sums: bool) -> Cost:
    """Half along rows first, half along columns first, at the same time."""
    width = row_length(costs.p, costs.plan)
    height = costs.p // width
    far = width // costs.m if costs.h > 1 and width > costs.m else 0
    rows = costs.ring(width, far, n / 2 / width + n / 2 / costs.p, lanes=4, sums=sums)
    columns = costs.ring(
        height,
        height if costs.h > 1 else 0,
        n / 2 / height + n / 2 / costs.p,
        flows=costs.flows,
        lanes=4,
        sums=sums,
    )
    both = rows + columns
    sent = (costs.p - 1) * n / costs.p
    return replace(both, bytes_sent=sent, reduction_s=sent * costs.gamma if sums else 0.0)


def _all_reduce(costs: Costs, name: str, n: float) -> Cost:
    p = costs.p
    if name == "leader":
        hosts = costs.plan.hosts
        width = p // hosts
        up = costs.steps(width - 1, n, costs.local, sums=True)
        down = costs.steps(width - 1, n, costs.local)
        ring = costs.ring(hosts, hosts if costs.h > 1 else 0, n / hosts, sums=True)
        back = costs.ring(hosts, hosts if costs.h > 1 else 0, n / hosts)
        total = up + ring + back + down
        # The leader sends its share of the ring and the vector to its neighbour, others twice n.
        sent = ring.bytes_sent + back.bytes_sent + (n if width > 1 else 0)
        sent = max(sent, 2 * n) if width > 2 else sent
        return replace(total, bytes_sent=sent)
    if name == "tree":
        return costs.trees(n, both_ways=True, sums=True)
    if name == "one_shot":
        return costs.exchange(n, sums=True)
    if name == "recursive_doubling":
        return costs.doubling(lambda distance: n, sums=True) + _beyond_core(costs, n)
    if name == "rabenseifner":
        core = 1 << (p.bit_length() - 1)
        there = costs.doubling(lambda distance: n * distance / core, sums=True)
        back = costs.doubling(lambda distance: n * distance / core, sums=False)
        return there + back + _beyond_core(costs, n, is_both=True)
    half = {"two_shot": "one_shot"}.get(name, name)
    return _all_gather(costs, half, n, sums=True) + _all_gather(costs, half, n, sums=False)


def _beyond_core(costs: Costs, n: float, *, is_both: bool = False) -> Cost:
    """What all-reduce by doubling takes more if p is no power of two: a member behind which another
    stands hears from it before, and tells it after.

    Where whole vectors are swapped, the greatest distance comes last. If half of the members or
    fewer have another behind them, no chain of messages has both, though a port passes both; with
    `is_both`, one has.
    """
    core = 1 << (costs.p.bit_length() - 1)
    extra = costs.p - core
    if not extra:
        return NOTHING
    link = costs.remote if costs.m == 1 and costs.h > 1 else costs.local
    heard = replace(costs.steps(1, n, link, sums=True), bytes_sent=0.0)
    if not is_both and 2 * extra <= core:
        heard = replace(heard, num_steps=0, latency_s=0.0)
    return heard + costs.steps(1, n, link)


def predict(task: Task, plan: Plan, topology: Topology, num_bytes: float) -> Cost:
    """The cost of a task as planned, for a vector of `num_bytes`."""
    costs, name, n = Costs(topology, plan), plan.algorithm, float(num_bytes)
    if task.op == "all_reduce":
        return _all_reduce(costs, name, n)
    if task.op in ("reduce_scatter", "all_gather"):
        return _all_gather(costs, name, n, sums=task.op == "reduce_scatter")
    sums = task.op == "reduce"
    if task.op in ("broadcast", "reduce"):
        if name == "ring":
            return costs.chain(n, sums=sums)
        if name == "tree":
            return costs.trees(n, both_ways=False, sums=sums)
        return costs.star(n, sums=sums)
    if task.op == "barrier":
        return costs.dissemination()
    if task.op == "all_to_all" and name == "bruck":
        return costs.bruck(n / task.ranks)
    if task.op == "all_to_all":
        return costs.exchange(n / task.ranks, sums=False)
    is_far = topology.host(task.root) != topology.host(task.peer)
    return costs.steps(1, n, costs.remote if is_far else costs.local)

"""How long a program takes, event by event, on the links of a topology.

Steps run by dependencies. A message leaves when its step is ready, its link free and its port out
free; it is served at each port and shared link in the order in which messages come there, and comes
in alpha + n * beta after it was served last. Reductions of a rank follow one another. Copies and
waking up cost nothing.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tokenmill.collectives.outline import Outline
from tokenmill.collectives.records import RECV_REDUCE, REDUCE, SEND
from tokenmill.collectives.topology import Link, Topology


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What came out. Bytes are those of the rank or host that has most."""

    time_s: float
    num_steps: int
    """Messages on the longest chain of which each waits for the one before."""
    num_messages: int
    bytes_sent: float
    uplink_bytes: float
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


class Events:
    """The state of ports and links, and the loop over events.

    An event is a time and a number: that of a step which is ready; beyond those, that of a rank
    whose port out is free for the next send in its queue; beyond those, that of a send which comes
    to the other host.
    """

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
        self._num_steps, num_ranks = len(outline.kind), len(outline.ranks)
        self._waits, self._followers = outline.waits, outline.followers
        self._first_arrival = self._num_steps + num_ranks
        self._heap: list[tuple[float, int]] = []
        self._ready, self._depth = [0.0] * self._num_steps, [0] * self._num_steps
        self._queues: list[deque[int]] = [deque() for _ in range(num_ranks)]
        self._out_free = [0.0] * num_ranks
        self._in_free = [0.0] * num_ranks
        self._reducer_free = [0.0] * num_ranks
        self._link_free = [0.0] * len(outline.links)
        uplinks = [self._uplink_of(rank) for rank in outline.ranks]
        self._up_free = [0.0] * (max(uplinks) + 1)
        self._down_free = [0.0] * (max(uplinks) + 1)
        self._started: dict[int, float] = {}
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
        """The loop: the earliest event goes next, and may bring others."""
        outline, heap = self._outline, self._heap
        kinds, num_steps, first_arrival = outline.kind, self._num_steps, self._first_arrival
        heap += [(0.0, step) for step, count in enumerate(outline.waits) if not count]
        end, num_done, pop = 0.0, 0, heapq.heappop
        while heap:
            now, number = pop(heap)
            if number >= first_arrival:
                self._arrive(number - first_arrival, now)
                continue
            if number >= num_steps:
                left = self._next_in_queue(number - num_steps, now)
            elif kinds[number] == SEND:
                left = self._ask(number, now)
            else:
                left = self._receive(number, now)
            if left >= 0.0:
                num_done += 1
                end = max(end, left)
        assert num_done == num_steps, "deadlock in a simulated program"
        return self._summary(end, max(self._depth, default=0))

    def _ask(self, step: int, now: float) -> float:
        """A send is ready: it starts, or queues for its port; when it has left, or -1."""
        link = self._outline.link[step]
        if self._link_free[link] > now:
            heapq.heappush(self._heap, (self._link_free[link], step))
            return -1.0
        source = self._links[link][0]
        queue = self._queues[source]
        if self._out_free[source] > now or queue:
            queue.append(step)
            if len(queue) == 1:
                self._call_queue(source)
            return -1.0
        return self._start(step, now)

    def _call_queue(self, source: int) -> None:
        heapq.heappush(self._heap, (self._out_free[source], self._num_steps + source))

    def _next_in_queue(self, source: int, now: float) -> float:
        """A port is free: start the first send whose link is free; when it has left, or -1."""
        queue, left = self._queues[source], -1.0
        while queue and left < 0.0:
            step = queue.popleft()
            link_free = self._link_free[self._outline.link[step]]
            if link_free > now:
                heapq.heappush(self._heap, (link_free, step))
            else:
                left = self._start(step, now)
        if queue:
            self._call_queue(source)
        return left

    def _start(self, step: int, now: float) -> float:
        """A send begins to leave; returns when its elements may be overwritten."""
        outline = self._outline
        link, count = outline.link[step], outline.count[step]
        source, _, up, _, _, gap_s, overhead_s, beta_s = self._links[link]
        busy_s = count * beta_s
        left = now + busy_s
        self._out_free[source] = left + overhead_s
        self._link_free[link] = left + gap_s
        if self._on_transfer:
            self._started[step] = now
        served = now
        if up >= 0:
            served = max(now, self._up_free[up])
            self._up_free[up] = served + busy_s
        if served > now:
            heapq.heappush(self._heap, (served, self._first_arrival + step))
        else:
            self._arrive(step, now)
        if outline.next_send[step] >= 0:
            self._release(outline.next_send[step], now, self._depth[step] + 1)
        self._complete(step, left)
        return left

    def _arrive(self, step: int, now: float) -> None:
        """A message has passed its uplink, if any, and comes to the receiver's side."""
        outline = self._outline
        link, count = outline.link[step], outline.count[step]
        source, target, _, down, alpha_s, _, overhead_s, beta_s = self._links[link]
        busy_s = count * beta_s
        served = now
        if down >= 0:
            served = max(served, self._down_free[down])
            self._down_free[down] = served + busy_s
        served = max(served, self._in_free[target])
        self._in_free[target] = served + busy_s + overhead_s
        arrival = served + alpha_s + busy_s
        if self._on_transfer:
            self._on_transfer(
                Transfer(
                    source=outline.ranks[source],
                    target=outline.ranks[target],
                    num_bytes=round(count * self._itemsize),
                    start_s=self._started.pop(step),
                    stop_s=arrival,
                )
            )
        self._release(outline.partner[step], arrival, self._depth[step] + 1)

    def _receive(self, step: int, now: float) -> float:
        """A receive, a copy or a reduce is ready; returns when it is complete."""
        outline = self._outline
        if outline.kind[step] in (RECV_REDUCE, REDUCE):
            rank = outline.owner[step]
            gamma = self._topology.links.gamma_s_per_byte * self._itemsize
            now = max(now, self._reducer_free[rank]) + outline.count[step] * gamma
            self._reducer_free[rank] = now
        self._complete(step, now)
        return now

    def _complete(self, step: int, at_s: float) -> None:
        """Release all that waits for a step; `_release` written out, as most time goes here."""
        ready, depth, waits, heap = self._ready, self._depth, self._waits, self._heap
        level = depth[step]
        for follower in self._followers[step]:
            if at_s > ready[follower]:
                ready[follower] = at_s
            if level > depth[follower]:
                depth[follower] = level
            waits[follower] -= 1
            if not waits[follower]:
                heapq.heappush(heap, (ready[follower], follower))

    def _release(self, step: int, at_s: float, level: int) -> None:
        """One thing less that a step waits for."""
        ready, waits = self._ready, self._waits
        if at_s > ready[step]:
            ready[step] = at_s
        if level > self._depth[step]:
            self._depth[step] = level
        waits[step] -= 1
        if not waits[step]:
            heapq.heappush(self._heap, (ready[step], step))

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
            bytes_sent=max(sent) * self._itemsize,
            uplink_bytes=max(leaving.values(), default=0) * self._itemsize,
            is_exact=self._is_exact,
        )


def _constants(link: Link, itemsize: float) -> tuple[float, float, float, float]:
    """alpha, gap, overhead, and seconds for each element."""
    return link.alpha_s, link.busy_s, link.overhead_s, link.beta_s_per_byte * itemsize

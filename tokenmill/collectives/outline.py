"""A program as the simulator needs it: who waits for what, and how many bytes go where.

Ranks that do the same at the same time need not be simulated one by one. Where turning or mirroring
the hosts maps an algorithm onto itself (`is_symmetric`), the ranks of one host stand for all: what
one sends to another host comes in at its own host, to the rank of the same number there, as what
the other hosts send to it does.
"""

from array import array
from collections.abc import Sequence

from tokenmill.collectives.algorithms.torus import row_length
from tokenmill.collectives.catalog import write_records
from tokenmill.collectives.program import Plan
from tokenmill.collectives.ranges import size
from tokenmill.collectives.records import SEND, Record, dependencies
from tokenmill.collectives.task import Task
from tokenmill.collectives.topology import Topology


class Outline:
    """The steps of some ranks, numbered through.

    `followers[s]` wait for step s to be complete; `next_send[s]` (-1: none) leaves after s on the
    same lane; `partner[s]` is the receive that gets what s sends; `link[s]` an index in `links`.
    """

    def __init__(self, task: Task, plan: Plan, ranks: Sequence[int], topology: Topology) -> None:
        self.ranks = ranks
        self.kind = bytearray()
        self.owner = array("i")
        """Positions in `ranks`."""
        self.count = array("q")
        self.waits: list[int] = []
        """Steps and messages that a step waits for."""
        self.followers: list[list[int]] = []
        self.next_send: list[int] = []
        self.partner: list[int] = []
        self.link: list[int] = []
        self.links: list[tuple[int, int, bool]] = []
        """Sender and receiver, as positions in `ranks`, and whether their hosts differ."""
        self._topology = topology
        self._position = {rank: index for index, rank in enumerate(ranks)}
        self._link_index: dict[tuple[int, int], int] = {}
        self._sends: dict[tuple[int, int, int], list[int]] = {}
        self._recvs: dict[tuple[int, int, int], list[int]] = {}
        self._known: dict[tuple[bytes, tuple[int, ...]], list[tuple[int, ...]]] = {}
        for index, rank in enumerate(ranks):
            _, records = write_records(task, plan, rank)
            self._add_steps(index, records)
            self._add_messages(index, records, first=len(self.kind) - len(records))
        self._join()

    def _add_steps(self, index: int, records: list[Record]) -> None:
        """Steps and what they wait for.

        Ranks with the same kinds of steps on as many elements have the same dependencies: blocks
        are others, but overlap in the same way.
        """
        kinds = bytes([record.kind for record in records])
        counts = tuple([size(record.ranges) for record in records])
        after = self._known.get((kinds, counts))
        if after is None:
            after = self._known[kinds, counts] = dependencies(records)
        first = len(self.kind)
        self.kind += kinds
        self.owner.extend([index] * len(kinds))
        self.count.extend(counts)
        self.waits.extend(map(len, after))
        self.followers.extend([] for _ in after)
        for number, earlier in enumerate(after, start=first):
            for before in earlier:
                self.followers[first + before].append(number)

    def _add_messages(self, index: int, records: list[Record], *, first: int) -> None:
        self.next_send.extend([-1] * len(records))
        self.partner.extend([-1] * len(records))
        self.link.extend([-1] * len(records))
        last: dict[tuple[int, int], int] = {}
        for number, record in enumerate(records, start=first):
            peer, tag = record.peer, record.tag
            if peer < 0:
                continue
            stand_in = self._position.get(peer)
            if stand_in is None:
                stand_in = self._topology.local_rank(peer)
            if record.kind != SEND:
                self._recvs.setdefault((stand_in, index, tag), []).append(number)
                continue
            self._sends.setdefault((index, stand_in, tag), []).append(number)
            self.link[number] = self._find_link(index, peer, stand_in)
            before = last.get((peer, tag))
            if before is not None:
                self.next_send[before] = number
                self.waits[number] += 1
            last[peer, tag] = number

    def _find_link(self, source: int, peer: int, stand_in: int) -> int:
        found = self._link_index.get((source, peer))
        if found is None:
            found = self._link_index[source, peer] = len(self.links)
            is_remote = self._topology.host(self.ranks[source]) != self._topology.host(peer)
            self.links.append((source, stand_in, is_remote))
        return found

    def _join(self) -> None:
        """Lay messages between sends and receives, which wait for them."""
        assert self._sends.keys() == self._recvs.keys(), "the algorithm is not symmetric"
        for lane, sends in self._sends.items():
            for send, recv in zip(sends, self._recvs[lane], strict=True):
                self.partner[send] = recv
                self.waits[recv] += 1


def is_symmetric(task: Task, plan: Plan, topology: Topology) -> bool:
    """Whether the ranks of one host can stand for those of every other."""
    name, width = plan.algorithm, topology.ranks_per_host
    if plan.order or task.counts or topology.hosts == 1 or topology.is_interleaved:
        return False
    if name == "ring":
        return task.op in ("all_reduce", "reduce_scatter", "all_gather")
    if name in ("hierarchical", "leader"):
        return plan.hosts == topology.hosts
    if name == "torus":
        row = row_length(task.ranks, plan)
        return row % width == 0 or width % row == 0
    if name in ("recursive_doubling", "rabenseifner") and task.op != "barrier":
        return task.ranks & (task.ranks - 1) == 0
    return name == "bruck" or (name == "one_shot" and task.op in ("all_to_all", "all_gather"))

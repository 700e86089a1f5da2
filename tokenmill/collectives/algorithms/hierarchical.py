"""Rings in two levels, for hosts whose ranks are nearer to each other than to the next host.

Place host * m + local is rank `local` of `m` on `host`. The hierarchical form keeps all ranks busy
between the hosts (each runs a ring with its twins on the others, with n/m elements); the leader
form has one ring between hosts, of the first rank of each, as in Jia et al., "Highly scalable deep
learning training system" (2018).
"""

from collections.abc import Callable

from tokenmill.collectives.algorithms.ring import (
    Ring,
    make_ring,
    write_all_gather,
    write_chain_broadcast,
    write_chain_reduce,
    write_reduce_scatter,
)
from tokenmill.collectives.ranges import Ranges, joined, part
from tokenmill.collectives.writer import Blocks, Scope, Writer

_IN_HOST, _BETWEEN_HOSTS = 0, 1


class _Levels:
    """Both rings of a place, and what each position of them owns."""

    def __init__(self, scope: Scope, blocks: Blocks | None = None) -> None:
        self.hosts = scope.plan.hosts
        self.width = scope.size // self.hosts
        self.host, self.local = divmod(scope.place, self.width)
        self._blocks = blocks or scope.blocks(self._index)
        self._parts: dict[int, Ranges] = {}

    def _index(self, place: int) -> int:
        """Blocks in an order in which those of one local rank's twins are neighbours."""
        host, local = divmod(place, self.width)
        return local * self.hosts + host

    @property
    def inner(self) -> Ring:
        first = self.host * self.width
        return make_ring(self.local, self.width, lambda index: first + index, _IN_HOST)

    @property
    def outer(self) -> Ring:
        place: Callable[[int], int] = lambda index: index * self.width + self.local  # noqa: E731
        return make_ring(self.host, self.hosts, place, _BETWEEN_HOSTS)

    def of_local(self, local: int) -> Ranges:
        """What the ranks of this local number own on all hosts: blocks with strides."""
        if local not in self._parts:
            places = range(local, self.hosts * self.width, self.width)
            self._parts[local] = self._blocks.union(places)
        return self._parts[local]

    def of_host(self, host: int) -> Ranges:
        """What this place's twin on a host owns."""
        return self._blocks(host * self.width + self.local)


def reduce_scatter(scope: Scope, write: Writer) -> None:
    """In the host, then between hosts: m - 1 and h - 1 steps."""
    levels = _Levels(scope)
    write_reduce_scatter(write, levels.inner, levels.of_local)
    write_reduce_scatter(write, levels.outer, levels.of_host)


def all_gather(scope: Scope, write: Writer) -> None:
    """Between hosts, then in the host."""
    levels = _Levels(scope)
    write_all_gather(write, levels.outer, levels.of_host)
    write_all_gather(write, levels.inner, levels.of_local)


def all_reduce(scope: Scope, write: Writer) -> None:
    """2(m-1) + 2(h-1) steps; 2(h-1)n/h leave and enter a host."""
    reduce_scatter(scope, write)
    all_gather(scope, write)


def leader_all_reduce(scope: Scope, write: Writer) -> None:
    """Reduce to the first rank of the host, a ring of the first ranks, broadcast in the host."""
    levels = _Levels(scope)
    inner, outer, whole = levels.inner, levels.outer, scope.whole
    write_chain_reduce(write, inner, levels.local, whole)
    if levels.local == 0:
        block: Callable[[int], Ranges] = lambda host: joined(  # noqa: E731
            [part(scope.region, levels.hosts, host)]
        )
        write_reduce_scatter(write, outer, block)
        write_all_gather(write, outer, block)
    write_chain_broadcast(write, inner, levels.local, whole)

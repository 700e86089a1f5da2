"""Partners at distances that double: few steps. Thakur, Rabenseifner and Gropp, "Optimization of
collective communication operations in MPICH" (2005).

Where p is no power of two, the first 2 * extra places work in pairs: the even one hands its vector
to the odd one before, and gets the result after, one more step each.
"""

from dataclasses import dataclass

from tokenmill.collectives.ranges import size
from tokenmill.collectives.writer import Blocks, Scope, Writer


@dataclass(frozen=True, slots=True)
class Core:
    """The power of two places that exchange, and those that stand behind others."""

    size: int
    """Members: the greatest power of two that is at most p."""
    extra: int

    @staticmethod
    def of(places: int) -> "Core":
        members = 1 << (places.bit_length() - 1)
        return Core(members, places - members)

    def member(self, place: int) -> int:
        """The number of a place among the members, -1 for one that stands behind the next."""
        if place >= 2 * self.extra:
            return place - self.extra
        return place // 2 if place % 2 else -1

    def place(self, member: int) -> int:
        return 2 * member + 1 if member < self.extra else member + self.extra

    def places(self, first: int, last: int) -> range:
        """Members first to last - 1 and who stands behind them."""
        start = 2 * first if first < self.extra else first + self.extra
        stop = 2 * last if last < self.extra else last + self.extra
        return range(start, stop)

    def distances(self) -> list[int]:
        """1, 2, 4 ... below the number of members."""
        return [1 << bit for bit in range(self.size.bit_length() - 1)]


def all_reduce(scope: Scope, write: Writer) -> None:
    """Recursive doubling: log2 p steps with the whole vector (one more if p is no power of two)."""
    core, whole = Core.of(scope.size), scope.whole
    here = core.member(scope.place)
    if here < 0:
        write.send(scope.place + 1, whole)
        write.recv(scope.place + 1, whole)
        return
    has_partner = here < core.extra
    if has_partner:
        write.recv_reduce(scope.place - 1, whole)
    # Partners exchange the same elements, so what comes must wait beside until what goes has gone.
    heard = write.scratch("heard", size(whole) if core.size > 1 else 0)
    heard_ranges = ((0, size(whole)),) if whole else ()
    for distance in core.distances():
        partner = core.place(here ^ distance)
        write.send(partner, whole)
        write.recv(partner, heard_ranges, buffer=heard)
        write.reduce(heard, heard_ranges, "data", whole)
    if has_partner:
        write.send(scope.place - 1, whole)


def rabenseifner_all_reduce(scope: Scope, write: Writer) -> None:
    """Reduce-scatter by halving, all-gather by doubling: 2 ceil(log2 p) steps, 2(p-1)n/p sent."""
    core, blocks = Core.of(scope.size), scope.blocks()
    here = core.member(scope.place)
    if here < 0:
        write.send(scope.place + 1, scope.whole)
        write.recv(scope.place + 1, scope.whole)
        return
    if here < core.extra:
        write.recv_reduce(scope.place - 1, scope.whole)
    _write_halving(write, core, here, blocks)
    _write_doubling(write, core, here, blocks)
    if here < core.extra:
        write.send(scope.place - 1, scope.whole)


def reduce_scatter(scope: Scope, write: Writer) -> None:
    """Recursive halving."""
    core, blocks = Core.of(scope.size), scope.blocks()
    here, all_blocks = core.member(scope.place), blocks.union(range(scope.size))
    if here < 0:
        write.send(scope.place + 1, all_blocks)
        write.recv(scope.place + 1, blocks(scope.place))
        return
    if here < core.extra:
        write.recv_reduce(scope.place - 1, all_blocks)
    _write_halving(write, core, here, blocks)
    if here < core.extra:
        write.send(scope.place - 1, blocks(scope.place - 1))


def all_gather(scope: Scope, write: Writer) -> None:
    """Recursive doubling of what is known."""
    core, blocks = Core.of(scope.size), scope.blocks()
    here, all_blocks = core.member(scope.place), blocks.union(range(scope.size))
    if here < 0:
        write.send(scope.place + 1, blocks(scope.place))
        write.recv(scope.place + 1, all_blocks)
        return
    if here < core.extra:
        write.recv(scope.place - 1, blocks(scope.place - 1))
    _write_doubling(write, core, here, blocks)
    if here < core.extra:
        write.send(scope.place - 1, all_blocks)


def _group(core: Core, here: int, distance: int) -> range:
    """The places of the `distance` members, aligned, to which a member belongs."""
    first = here & -distance
    return core.places(first, first + distance)


def _write_halving(write: Writer, core: Core, here: int, blocks: Blocks) -> None:
    for distance in reversed(core.distances()):
        partner = here ^ distance
        place = core.place(partner)
        write.send(place, blocks.union(_group(core, partner, distance)))
        write.recv_reduce(place, blocks.union(_group(core, here, distance)))


def _write_doubling(write: Writer, core: Core, here: int, blocks: Blocks) -> None:
    for distance in core.distances():
        partner = here ^ distance
        place = core.place(partner)
        write.send(place, blocks.union(_group(core, here, distance)))
        write.recv(place, blocks.union(_group(core, partner, distance)))


def barrier(scope: Scope, write: Writer) -> None:
    """Dissemination: after step k everyone has heard of the 2^(k+1) - 1 places before it."""
    token = ((0, 1),)
    heard = write.scratch("heard", 1 if scope.size > 1 else 0)
    distance = 1
    while distance < scope.size:
        write.send((scope.place + distance) % scope.size, token, buffer="token")
        write.recv((scope.place - distance) % scope.size, token, buffer=heard)
        write.copy(heard, token, "token", token)
        distance *= 2

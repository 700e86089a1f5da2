"""Everyone with everyone at once: one step or two, and p - 1 messages in each.

What is reduced here is reduced in ascending order of rank, for every element, into a wide
accumulator: ((x0 + x1) + x2) + ... So the bits depend neither on the number of elements nor on
which of these algorithms ran. (Places are ranks here: a plan's order does not apply.)
"""

from collections.abc import Iterable

from tokenmill.collectives.ranges import Ranges, joined, size
from tokenmill.collectives.writer import DATA, Scope, Writer


def _others(scope: Scope) -> Iterable[int]:
    """All other ranks, beginning after one's own so that not all call on the same one first."""
    return ((scope.place + step) % scope.size for step in range(1, scope.size))


def _write_ordered_sum(scope: Scope, write: Writer, ranges: Ranges) -> None:
    """Sum these elements over all ranks, whose vectors are on their way here, into `data`."""
    count = size(ranges)
    total = write.scratch("total", count if scope.size > 1 else 0, is_wide=True)
    here: Ranges = ((0, count),) if count else ()
    for rank in range(scope.size if scope.size > 1 else 0):
        if rank == scope.place:
            (write.reduce if rank else write.copy)(DATA, ranges, total, here)
        else:
            (write.recv_reduce if rank else write.recv)(rank, here, buffer=total)
    if scope.size > 1:
        write.copy(total, here, DATA, ranges)


def one_shot_all_reduce(scope: Scope, write: Writer) -> None:
    """Everyone sends its vector to everyone: one step, (p-1)n sent."""
    for other in _others(scope):
        write.send(other, scope.whole)
    _write_ordered_sum(scope, write, scope.whole)


def two_shot_all_reduce(scope: Scope, write: Writer) -> None:
    """Reduce-scatter, then all-gather, each in one step: 2(p-1)n/p sent."""
    reduce_scatter(scope, write)
    all_gather(scope, write)


def reduce_scatter(scope: Scope, write: Writer) -> None:
    """Everyone sends each block to its owner."""
    blocks = scope.blocks()
    for other in _others(scope):
        write.send(other, blocks(other))
    _write_ordered_sum(scope, write, blocks(scope.place))


def all_gather(scope: Scope, write: Writer) -> None:
    """Everyone sends its block to everyone."""
    blocks = scope.blocks()
    for other in _others(scope):
        write.send(other, blocks(scope.place), lane=1)
    for other in _others(scope):
        write.recv(other, blocks(other), lane=1)


def reduce(scope: Scope, write: Writer) -> None:
    """Everyone sends its vector to the root."""
    if scope.place == scope.root:
        _write_ordered_sum(scope, write, scope.whole)
    else:
        write.send(scope.root, scope.whole)


def broadcast(scope: Scope, write: Writer) -> None:
    """The root sends to everyone."""
    if scope.place != scope.root:
        write.recv(scope.root, scope.whole)
        return
    for other in _others(scope):
        write.send(other, scope.whole)


def all_to_all(scope: Scope, write: Writer) -> None:
    """Everyone sends to each its block, to the next rank first."""
    sent = scope.task.sent_ranges(scope.place)
    received = scope.task.received_ranges(scope.place)

    def of(ranges: tuple[tuple[int, int], ...], rank: int) -> Ranges:
        return joined([scope.sliced(ranges[rank])])

    write.copy("input", of(sent, scope.place), "output", of(received, scope.place))
    for step in range(1, scope.size):
        ahead, behind = (scope.place + step) % scope.size, (scope.place - step) % scope.size
        write.send(ahead, of(sent, ahead), buffer="input")
        write.recv(behind, of(received, behind), buffer="output")


def send_recv(scope: Scope, write: Writer) -> None:
    """One message, or as many as there are slices."""
    if scope.place == scope.task.root:
        write.send(scope.task.peer, scope.whole)
    elif scope.place == scope.task.peer:
        write.recv(scope.task.root, scope.whole)

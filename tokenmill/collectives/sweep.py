"""One operation over many sizes, as `tokenmill collectives bench` and the benchmarks measure it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tokenmill.collectives.arithmetic import DataType
from tokenmill.collectives.bandwidth import bus_bandwidth
from tokenmill.collectives.calls import Request
from tokenmill.collectives.communicator import Communicator
from tokenmill.collectives.measure import measure, measure_call
from tokenmill.collectives.task import Task

PeerCall = Callable[[int], Callable[[], object]]
"""Of a number of elements makes the same operation as another library does it."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is measured: sizes from `min_bytes` to `max_bytes`, each `factor` times the last."""

    op: str
    dtype: DataType
    min_bytes: int
    max_bytes: int
    factor: int
    num_iters: int
    num_rounds: int

    def counts(self, size: int) -> Iterator[int]:
        """Elements of the full vector, a multiple of the number of ranks."""
        num_bytes = self.min_bytes
        while num_bytes <= self.max_bytes:
            yield max(size, num_bytes // self.dtype.numpy.itemsize // size * size)
            num_bytes *= self.factor


def measure_sizes(
    ranks: Communicator, sweep: Sweep, peer: PeerCall | None = None
) -> list[dict[str, object]]:
    """A row for each size: what it is, seconds, bytes a second, elements that were wrong; and
    seconds and bytes a second of the peer's."""
    return [_measure(ranks, sweep, count, peer) for count in sweep.counts(ranks.size)]


def _measure(
    ranks: Communicator, sweep: Sweep, count: int, peer: PeerCall | None
) -> dict[str, object]:
    op, dtype = sweep.op, sweep.dtype
    how = {"num_iters": sweep.num_iters, "num_rounds": sweep.num_rounds}
    task = Task(op=op, ranks=ranks.size, count=count)
    moved = count * dtype.numpy.itemsize
    found = measure(ranks, op, count, dtype, **how)
    request = Request(op, count, dtype, "sum" if task.is_reducing else None)
    row: dict[str, object] = {
        "num_bytes": moved,
        "count": count,
        "dtype": dtype.name,
        "algorithm": ranks.plan_of(request).algorithm,
        "time_s": found.time_s,
        "algbw": moved / found.time_s,
        "busbw": bus_bandwidth(task, moved, found.time_s),
        "num_wrong": found.num_wrong,
    }
    if peer is not None:
        time_s = measure_call(ranks, peer(count), 0, **how).time_s
        row |= {"gloo_time_s": time_s, "gloo_busbw": bus_bandwidth(task, moved, time_s)}
    return row

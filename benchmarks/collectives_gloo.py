"""All-reduce of two ranks in shared memory against gloo, in one run: small and large vectors.

This process is rank 0 and starts rank 1. Both sides take turns on the same vectors; a figure is a
rate, so that the ratio is that of gloo's time to ours. Needs torch.
"""

import argparse
import multiprocessing
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import Figure, compare, report

from tokenmill.collectives.arithmetic import data_type
from tokenmill.collectives.communicator import Communicator
from tokenmill.collectives.connect import connect
from tokenmill.collectives.measure import measure_call, sample
from tokenmill.collectives.torch.gloo import join_gloo, make_gloo_call

TARGETS = {8 << 10: 5.0, 16 << 20: 1.5}
"""How many times gloo's time is ours, by bytes of the vector."""
_CALLS_BYTES = 64 << 20
"""A sample moves so many bytes, in at most _MOST_CALLS."""
_MOST_CALLS = 500
_F32 = data_type("f32")
_OURS, _GLOO, _STOP = range(3)
_TIMEOUT_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="pairs of samples (default: 7)")
    parser.add_argument(
        "--patience",
        type=float,
        default=20,
        metavar="SECONDS",
        help="how long to repeat samples that other processes disturbed (default: 20)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    args.threads = 2  # a rank each
    with tempfile.TemporaryDirectory() as folder:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        where = address, str(Path(folder, "gloo"))
        peer = multiprocessing.get_context("spawn").Process(target=follow, args=where, daemon=True)
        peer.start()
        with join(0, *where) as ranks:
            figures = [measure(ranks, size, args) for size in TARGETS]
            run(ranks, _STOP, 0)
        peer.join(_TIMEOUT_S)
    report(figures, args, note=f"2 ranks, {ranks.transport_name}; peer: gloo")


def join(rank: int, address: str, gloo_file: str) -> Communicator:
    join_gloo(gloo_file, rank, 2, _TIMEOUT_S)
    return connect(address, rank=rank, size=2, timeout_s=_TIMEOUT_S, transport="shared_memory")


def follow(address: str, gloo_file: str) -> None:
    """Rank 1: do what rank 0 does."""
    with join(1, address, gloo_file) as ranks:
        side = np.zeros(2, np.int64)
        while side[0] != _STOP:
            ranks.broadcast(side)
            time_calls(ranks, int(side[0]), int(side[1]))


def run(ranks: Communicator, side: int, num_bytes: int) -> float:
    """Calls a second, of both ranks together."""
    ranks.broadcast(np.array([side, num_bytes]))
    return time_calls(ranks, side, num_bytes)


def time_calls(ranks: Communicator, side: int, num_bytes: int) -> float:
    if side == _STOP:
        return 0.0
    count = num_bytes // _F32.numpy.itemsize
    num_iters = min(_MOST_CALLS, max(1, _CALLS_BYTES // num_bytes))
    call = make_call(ranks, side, count)
    return 1 / measure_call(ranks, call, 0, num_iters=num_iters, num_rounds=1).time_s


def make_call(ranks: Communicator, side: int, count: int) -> Callable[[], object]:
    if side == _GLOO:
        return make_gloo_call("all_reduce", count, _F32, ranks.rank, ranks.size)
    data = sample(ranks.rank, count, _F32)
    return lambda: ranks.all_reduce(data)


def measure(ranks: Communicator, num_bytes: int, args: argparse.Namespace) -> Figure:
    size = f"{num_bytes >> 20} MiB" if num_bytes >> 20 else f"{num_bytes >> 10} KiB"
    return compare(
        f"all-reduce of {size}",
        "calls/s",
        lambda: run(ranks, _OURS, num_bytes),
        lambda: run(ranks, _GLOO, num_bytes),
        args=args,
        target=TARGETS[num_bytes],
    )


if __name__ == "__main__":
    main()

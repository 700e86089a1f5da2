"""`tokenmill collectives bench`: time, bandwidths and errors by size, beside gloo's."""

import importlib.util
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any

from tokenmill.cli import collectives_arguments as shared
from tokenmill.errors import CollectiveError, TokenmillError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenmill.collectives.communicator import Communicator
    from tokenmill.collectives.sweep import Sweep

_HEAD = ("bytes", "count", "type", "algorithm", "time us", "algbw GB/s", "busbw GB/s", "errors")
_GLOO_HEAD = ("gloo us", "busbw GB/s", "gloo/ours")
_PATIENCE_S = 5.0


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--op", default="allreduce", help="the operation (default: %(default)s)")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="processes to start on this host (default: 2)"
    )
    for flag, default, text in (
        ("--num-iters", 20, "calls in a round"),
        ("--num-rounds", 5, "rounds, of which the best counts"),
    ):
        parser.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    for flag, size in (("--min-size", "8"), ("--max-size", "16M")):
        parser.add_argument(
            flag, default=size, metavar="BYTES", help="of the full vector (default: %(default)s)"
        )
    parser.add_argument(
        "--factor", type=int, default=8, metavar="N", help="between sizes (default: %(default)s)"
    )
    parser.add_argument("--dtype", default="f32", help="f32, f64, f16, bf16, i8, i32, i64")
    parser.add_argument(
        "--transport",
        default="auto",
        choices=("auto", "shared_memory", "sockets", "torch", "mpi"),
        help="between the processes (default: shared memory, where it is to be had); torch: gloo's "
        "send and recv; mpi: start the command itself with mpiexec -n N",
    )
    parser.add_argument("--timeout", type=float, default=60, metavar="SECONDS")
    parser.add_argument("--no-gloo", action="store_true", help="do not measure gloo beside it")
    parser.add_argument("--json", action="store_true", help="print one object")


def bench(values: dict[str, Any]) -> None:
    """Start the ranks, and print what rank 0 measured."""
    _check(values)
    rows = _run_under_mpi(values) if values["transport"] == "mpi" else _run_beside_gloo(values)
    if rows is None:
        return
    if values["json"]:
        print(json.dumps({"op": values["op"], "ranks": values["ranks"], "rows": rows}))
    else:
        _print_table(rows)
    num_wrong = sum(row["num_wrong"] for row in rows)
    if num_wrong:
        raise TokenmillError(f"{num_wrong} elements were wrong")


def _run_beside_gloo(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, gloo's times with them where there is torch."""
    has_torch = importlib.util.find_spec("torch") is not None
    is_over_torch = values["transport"] == "torch"
    if is_over_torch and not has_torch:
        raise UsageError("--transport torch needs torch: pip install 'tokenmill[torch]'")
    if not has_torch and not values["no_gloo"]:
        print("gloo is not measured: torch is not installed", file=sys.stderr)
    values["ranks"] = 2 if values["ranks"] is None else values["ranks"]
    with tempfile.TemporaryDirectory() as folder:
        joins = is_over_torch or (has_torch and not values["no_gloo"])
        values["gloo_file"] = str(Path(folder, "gloo")) if joins else None
        return _run(values)


def _check(values: dict[str, Any]) -> None:
    from tokenmill.collectives.arithmetic import data_type
    from tokenmill.collectives.measure import MEASURED_OPS

    values["op"] = shared.read_op(values["op"])
    if values["op"] not in MEASURED_OPS:
        raise UsageError(f"--op is {values['op']}, but must be one of {', '.join(MEASURED_OPS)}")
    for name, least in (("ranks", 1), ("num_iters", 1), ("num_rounds", 1), ("factor", 2)):
        if values[name] is not None and values[name] < least:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} is {values[name]}, but must be at least {least}")
    data_type(values["dtype"])
    for name in ("min_size", "max_size"):
        values[name] = shared.read_size(values[name])
    if values["min_size"] > values["max_size"]:
        raise UsageError("--min-size is above --max-size: there is nothing to measure")
    if not values["timeout"] > 0:
        raise UsageError(f"--timeout is {values['timeout']:g} s, but must be above 0")


def _run(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Processes for all ranks; returns rank 0's rows. None outlives this function."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        values["address"] = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [
        context.Process(target=_rank, args=(rank, values, answers), daemon=True)
        for rank in range(values["ranks"])
    ]
    for process in processes:
        process.start()
    try:
        said: list[tuple[int, str | None, list[dict[str, Any]]]] = []
        while len(said) < len(processes):
            try:
                said.append(answers.get(timeout=_PATIENCE_S))
            except Empty:
                dead = [p for p in processes if p.exitcode not in (None, 0)]
                if dead and len(said) + len(dead) >= len(processes):
                    break
    finally:
        for process in processes:
            process.join(_PATIENCE_S)
            process.kill()
    errors = [error for _, error, _ in sorted(said, key=lambda one: one[0]) if error]
    if errors or len(said) < len(processes):
        raise CollectiveError(errors[0] if errors else "a process has ended without an answer")
    return next(rows for rank, _, rows in said if rank == 0)


def _rank(rank: int, values: dict[str, Any], answers: Any) -> None:
    """A process: measures, and says what it found or what went wrong."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        answers.put((rank, None, _measure_all(rank, values)))
    except TokenmillError as error:
        answers.put((rank, str(error), []))


def _measure_all(rank: int, values: dict[str, Any]) -> list[dict[str, Any]]:
    from tokenmill.collectives.sweep import measure_sizes

    sweep = _sweep(values)
    if values["gloo_file"]:
        from tokenmill.collectives.torch.gloo import join_gloo

        join_gloo(values["gloo_file"], rank, values["ranks"], values["timeout"])
    with _connect(rank, values) as ranks:
        peer = None
        if values["gloo_file"] and not values["no_gloo"]:
            from tokenmill.collectives.torch.gloo import make_gloo_call

            def peer(count: int) -> "Callable[[], object]":
                return make_gloo_call(sweep.op, count, sweep.dtype, rank, ranks.size)

        return measure_sizes(ranks, sweep, peer)


def _sweep(values: dict[str, Any]) -> "Sweep":
    from tokenmill.collectives.arithmetic import data_type
    from tokenmill.collectives.sweep import Sweep

    return Sweep(
        op=values["op"],
        dtype=data_type(values["dtype"]),
        min_bytes=values["min_size"],
        max_bytes=values["max_size"],
        factor=values["factor"],
        num_iters=values["num_iters"],
        num_rounds=values["num_rounds"],
    )


def _connect(rank: int, values: dict[str, Any]) -> "Communicator":
    timeout_s = values["timeout"]
    if values["transport"] == "torch":
        from tokenmill.collectives.torch.meeting import connect_group

        return connect_group(timeout_s=timeout_s)
    from tokenmill.collectives.connect import connect

    return connect(
        values["address"],
        rank=rank,
        size=values["ranks"],
        timeout_s=timeout_s,
        transport=values["transport"],
    )


def _run_under_mpi(values: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows, at rank 0; this process is one of those that mpiexec has started."""
    from tokenmill.collectives.connect_mpi import connect_mpi, import_mpi
    from tokenmill.collectives.sweep import measure_sizes

    world = import_mpi().COMM_WORLD
    if values["ranks"] is not None and values["ranks"] != world.Get_size():
        raise UsageError(
            f"--ranks is {values['ranks']}, but MPI has {world.Get_size()}: start it with "
            f"mpiexec -n {values['ranks']} tokenmill collectives bench --transport mpi"
        )
    values["ranks"] = world.Get_size()
    with connect_mpi(timeout_s=values["timeout"]) as ranks:
        rows = measure_sizes(ranks, _sweep(values))
        return rows if ranks.rank == 0 else None


def _print_table(rows: list[dict[str, Any]]) -> None:
    has_gloo = "gloo_time_s" in rows[0]
    table = [list(_HEAD + (_GLOO_HEAD if has_gloo else ()))]
    for row in rows:
        cells = [str(row[name]) for name in ("num_bytes", "count", "dtype", "algorithm")]
        cells += [f"{row['time_s'] * 1e6:.1f}", f"{row['algbw'] / 1e9:.3f}"]
        cells += [f"{row['busbw'] / 1e9:.3f}", str(row["num_wrong"])]
        if has_gloo:
            ratio = row["gloo_time_s"] / row["time_s"]
            cells += [f"{row['gloo_time_s'] * 1e6:.1f}", f"{row['gloo_busbw'] / 1e9:.3f}"]
            cells.append(f"{ratio:.1f}")
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))

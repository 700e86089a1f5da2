"""Ranks that are processes: start them, hear what each says, and see that all have ended."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenmill.collectives.communicator import Communicator
from tokenmill.collectives.connect import connect
from tokenmill.errors import TokenmillError

_CONTEXT = multiprocessing.get_context("spawn")
WAIT_S = 60


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def segments() -> set[str]:
    """Names of shared memory of ours."""
    return {path.name for path in Path("/dev/shm").glob("tokenmill-*")}


def rank_main(
    rank: int,
    size: int,
    address: str,
    body: Callable[[Communicator], Any],
    options: dict[str, Any],
    answers: Any,
) -> None:
    options = {k: v[rank] if isinstance(v, list) else v for k, v in options.items()}
    gloo_file = options.pop("gloo_file", None)
    if gloo_file:
        join_gloo(gloo_file, rank, size, WAIT_S)
    try:
        with (
            connect_group(**options)
            if gloo_file
            else connect(address, **{"rank": rank, "size": size, **options})
        ) as ranks:
            answers.put((rank, body(ranks), time.monotonic()))
    except TokenmillError as error:
        answers.put((rank, f"error: {error}", time.monotonic()))


def join_gloo(path: str, rank: int, size: int, timeout_s: float) -> None:
    from tokenmill.collectives.torch import gloo  # only where torch is wanted

    gloo.join_gloo(path, rank, size, timeout_s)


def connect_group(**options: Any) -> Communicator:
    from tokenmill.collectives.torch import meeting

    return meeting.connect_group(**options)


def start_ranks(
    size: int,
    body: Callable[[Communicator], Any],
    /,
    *,
    only: Sequence[int] | None = None,
    port: int = 0,
    **options: Any,
) -> tuple[list[Any], Any]:
    """Processes, and where they answer. Options that are lists are given rank by rank; with
    `gloo_file` they are a group of torch.distributed that meets there."""
    address, answers = f"127.0.0.1:{port or free_port()}", _CONTEXT.Queue()
    options = {"timeout_s": 20.0} | options
    made = [
        _CONTEXT.Process(target=rank_main, args=(r, size, address, body, options, answers))
        for r in (range(size) if only is None else only)
    ]
    for process in made:
        process.start()
    return made, answers


def run_ranks(size: int, body: Callable[[Communicator], Any], /, **options: Any) -> list[Any]:
    """What each rank returned, or `error: ...`; all processes have ended."""
    made, answers = start_ranks(size, body, **options)
    got = dict(sorted(answers.get(timeout=WAIT_S)[:2] for _ in made))
    for process in made:
        process.join(WAIT_S)
        assert process.exitcode == 0
    return list(got.values())


def end_by_kill() -> None:
    os.kill(os.getpid(), 9)

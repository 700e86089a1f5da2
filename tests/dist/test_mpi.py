"""Communicators over MPI, where an MPI runtime is installed."""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.dist import test_failures as failures
from tests.dist import test_operations as operations
from tokenmill.collectives.communicator import Communicator

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "hydra": [],
    "Open MPI": ["--allow-run-as-root", "--oversubscribe", "--enable-recovery"],
}
"""By launcher: run anywhere, and leave it to us to find that a rank has died."""


@functools.cache
def find_mpiexec() -> str:
    pytest.importorskip("mpi4py")
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        pytest.skip("there is no mpiexec: install an MPI runtime, such as the package openmpi")
    return found


@functools.cache
def mpiexec_version() -> str:
    return subprocess.run([find_mpiexec(), "--version"], capture_output=True, text=True).stdout


def mpiexec() -> list[str]:
    for name, options in OPTIONS.items():
        if name.lower() in mpiexec_version().lower():
            return [find_mpiexec(), *options]
    pytest.skip(f"{find_mpiexec()} is of no MPI that this test knows")


def run_mpi(size: int, body, folder: Path, **options) -> list:
    """What each rank answered; None where it did not."""
    options = {"timeout_s": 20} | options
    module = f"tests.dist.{body.__module__.rpartition('.')[2]}"
    arguments = [module, body.__name__, str(folder), json.dumps(options)]
    done = subprocess.run(
        [*mpiexec(), "-n", str(size), sys.executable, "-m", "tests.dist.mpi_rank", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    print(done.returncode, done.stdout, done.stderr)
    files = [folder / str(rank) for rank in range(size)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def test_every_operation(tmp_path):
    answers = run_mpi(3, operations.every_operation, tmp_path, host_id=["a", "b", "a"])
    assert answers == ["MPI"] * 3


def test_every_type(tmp_path):
    assert run_mpi(2, operations.every_type, tmp_path) == ["done"] * 2


def test_messages_and_asynchronous_calls(tmp_path):
    assert run_mpi(2, operations.messages, tmp_path) == ["done"] * 2


def beside_mpi(ranks: Communicator) -> str:
    """The caller's own messages, of any tag, do not mix with ours; nor do two communicators."""
    from mpi4py import MPI

    from tokenmill.collectives.connect_mpi import connect_mpi

    world, peer = MPI.COMM_WORLD, 1 - ranks.rank
    mine, theirs = np.ones(300_000), np.empty(5)
    work = ranks.all_reduce(mine, is_async=True)
    received = world.Irecv(theirs, MPI.ANY_SOURCE, MPI.ANY_TAG)
    world.Send(np.full(5, 7.0), peer, tag=3)
    received.Wait()
    assert (theirs == 7).all()
    work.wait()
    with connect_mpi(world.Split(0, -ranks.rank), timeout_s=20) as turned:
        assert turned.rank == peer
        turned.all_reduce(mine)
    with connect_mpi(timeout_s=20) as again:
        again.all_reduce(mine)
    assert (mine == 8).all()
    return "done"


def test_mpi_stays_its_owners(tmp_path):
    assert run_mpi(2, beside_mpi, tmp_path) == ["done"] * 2


# -- what goes wrong


def test_ranks_that_do_different_things(tmp_path):
    answers = run_mpi(3, failures.different_types, tmp_path)
    for rank, answer in enumerate(answers):
        assert answer.startswith(f"error: rank {rank}: all_reduce of 1000 f"), answer
        assert "\n" not in answer


def test_a_message_of_the_wrong_length(tmp_path):
    answers = run_mpi(2, failures.wrong_length, tmp_path)
    assert answers[1] == (
        "error: rank 1: send/recv of 12 f32 (tag 0): rank 0 does send/recv of 10 f32 (tag 0) instead"
    )


def test_a_peer_that_is_killed(tmp_path):
    """Some launchers then end the others at once; if not, these say so."""
    started_s = time.monotonic()
    answers = run_mpi(4, failures.die_in_the_middle, tmp_path, timeout_s=50)
    assert time.monotonic() - started_s < 40, "they waited for the timeout"
    if "hydra" in mpiexec_version().lower():
        assert answers == [None] * 4
        return
    for rank in range(3):
        assert answers[rank].startswith(
            f"error: rank {rank}: all_reduce of 1048576 f64 by sum (call "
        )
        assert "rank 3 has ended" in answers[rank]


def test_a_peer_that_does_not_take_part(tmp_path):
    answers = run_mpi(2, failures.never_call, tmp_path, timeout_s=2)
    assert answers[0] == (
        "error: rank 0: all_reduce of 10 f64 by sum (call 1): nothing has come from rank 1 for 2 s"
    )


def test_a_peer_that_leaves(tmp_path):
    answers = run_mpi(2, failures.leave, tmp_path)
    assert answers[0].startswith("error: rank 0: all_reduce of 10 f64 by sum (call 1): rank 1 has ")


def come_late(ranks: Communicator) -> list[str]:
    """A second communicator for which one rank does not come."""
    from tokenmill.collectives.connect_mpi import connect_mpi

    if ranks.rank == ranks.size - 1:
        time.sleep(3)
        return ["error: late"]
    try:
        connect_mpi(timeout_s=1)
    except Exception as error:
        return [f"error: {error}"]
    return ["connected"]


def test_a_peer_that_never_comes(tmp_path):
    answers = run_mpi(3, come_late, tmp_path)
    for rank in (0, 1):
        assert answers[rank] == [f"error: rank {rank}: rank 2 of 3 has not come within 1 s"]


def test_without_mpi4py(monkeypatch):
    from tokenmill.collectives.connect_mpi import connect_mpi

    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(Exception, match=r"pip install 'tokenmill\[mpi\]'"):
        connect_mpi()

"""What goes wrong: one line on every rank, in time, that names rank, peer and operation."""

import os
import re
import socket
import time

import numpy as np
import pytest

from tests.dist.processes import WAIT_S, end_by_kill, free_port, run_ranks, segments, start_ranks
from tokenmill.collectives.communicator import Communicator

HOSTS = {"shared memory": ["a"] * 4, "sockets": ["a", "b", "c", "d"], "both": ["a", "b", "a", "b"]}


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert not segments()


def different_sizes(ranks: Communicator) -> None:
    ranks.barrier()
    ranks.all_reduce(np.zeros(2000 if ranks.rank == 2 else 1000, np.float32))


def different_types(ranks: Communicator) -> None:
    ranks.all_reduce(np.zeros(1000, np.float64 if ranks.rank == 2 else np.float32))


def different_operations(ranks: Communicator) -> None:
    if ranks.rank == 2:
        ranks.all_gather(np.zeros(1000, np.float32), np.zeros(250, np.float32))
    else:
        ranks.all_reduce(np.zeros(1000, np.float32))


def different_algorithms(ranks: Communicator) -> None:
    ranks.all_reduce(np.zeros(1000), algorithm="tree" if ranks.rank == 2 else "ring")


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (different_sizes, "does all_reduce of 2000 f32 by sum (call 2) instead"),
        (different_types, "does all_reduce of 1000 f64 by sum (call 1) instead"),
        (different_operations, "does all_gather of 1000 f32 (call 1) instead"),
        (different_algorithms, "does it by another algorithm"),
    ],
)
@pytest.mark.parametrize("hosts", HOSTS)
def test_ranks_that_do_different_things(body, detail, hosts):
    answers = run_ranks(4, body, host_id=HOSTS[hosts], timeout_s=15)
    for rank, answer in enumerate(answers):
        assert answer.startswith(f"error: rank {rank}: "), answer
        assert " all_" in answer
        assert "\n" not in answer
    # Rank 2 and its neighbours find out at the same time; the first to do so tells the others.
    seen_by_rank_2 = re.compile(r"rank \d does all_reduce of 1000 f(32|64) by sum \(call \d\) instead")
    assert any(detail in answer or seen_by_rank_2.search(answer) for answer in answers), answers


def wrong_length(ranks: Communicator) -> None:
    if ranks.rank == 0:
        ranks.send(np.zeros(10, np.float32), 1)
        ranks.barrier()
    else:
        ranks.recv(np.zeros(12, np.float32), 0)


def test_a_message_of_the_wrong_length():
    answers = run_ranks(2, wrong_length)
    assert answers[1] == (
        "error: rank 1: send/recv of 12 f32 (tag 0): rank 0 does send/recv of 10 f32 (tag 0) instead"
    )
    assert answers[0].startswith("error: rank 0: barrier (call 1): rank 1 gave up in send/recv of 12")


def die_in_the_middle(ranks: Communicator) -> None:
    ranks.all_reduce(np.zeros(100))
    if ranks.rank == 3:
        end_by_kill()
    for _ in range(1000):
        ranks.all_reduce(np.zeros(1 << 20), algorithm="ring")


@pytest.mark.parametrize("hosts", HOSTS)
def test_a_peer_that_is_killed(hosts):
    started_s = time.monotonic()
    made, answers = start_ranks(4, die_in_the_middle, host_id=HOSTS[hosts], timeout_s=50)
    got = dict(answers.get(timeout=WAIT_S)[:2] for _ in range(3))
    for process in made:
        process.join(WAIT_S)
    assert time.monotonic() - started_s < 40, "they waited for the timeout"
    assert [process.exitcode for process in made] == [0, 0, 0, -9]
    for rank in range(3):
        assert got[rank].startswith(f"error: rank {rank}: all_reduce of 1048576 f64 by sum (call ")
        assert "rank 3 has ended" in got[rank]


def never_call(ranks: Communicator) -> None:
    if ranks.rank == 1:
        time.sleep(4)
    else:
        ranks.all_reduce(np.zeros(10))


def test_a_peer_that_does_not_take_part():
    answers = run_ranks(2, never_call, timeout_s=2)
    assert answers[0] == (
        "error: rank 0: all_reduce of 10 f64 by sum (call 1): nothing has come from rank 1 for 2 s"
    )


def leave(ranks: Communicator) -> None:
    if ranks.rank == 0:
        ranks.all_reduce(np.zeros(10))


@pytest.mark.parametrize("hosts", [["a", "a"], ["a", "b"]])
def test_a_peer_that_leaves(hosts):
    answers = run_ranks(2, leave, host_id=hosts)
    assert answers[0].startswith("error: rank 0: all_reduce of 10 f64 by sum (call 1): rank 1 has ")


def fail_again(ranks: Communicator) -> list[str]:
    said = []
    for _ in range(2):
        try:
            ranks.all_reduce(np.zeros(10 + ranks.rank))
        except Exception as error:
            said.append(str(error))
    return said


def test_a_communicator_that_failed_stays_so():
    for answer in run_ranks(2, fail_again):
        assert "the communicator failed before: " in answer[1]


# -- coming together


def nothing(ranks: Communicator) -> None:
    ranks.barrier()


def test_a_peer_that_never_comes():
    made, answers = start_ranks(3, nothing, only=[0, 1], timeout_s=2)
    got = dict(answers.get(timeout=WAIT_S)[:2] for _ in made)
    assert got == {r: f"error: rank {r}: rank 2 of 3 has not come within 2 s" for r in (0, 1)}


def test_nobody_listens():
    made, answers = start_ranks(2, nothing, only=[1], timeout_s=1)
    (_, text, _), = [answers.get(timeout=WAIT_S) for _ in made]
    assert text.startswith("error: rank 1: rank 0 does not answer at 127.0.0.1:")


def test_a_port_in_use():
    """Rank 0 cannot listen; rank 1 finds a stranger there."""
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        answers = run_ranks(2, nothing, port=port, timeout_s=1)
    assert answers[0] == (
        f"error: rank 0: cannot listen on 127.0.0.1:{port}: address already in use: "
        "give another port"
    )
    assert answers[1].startswith(f"error: rank 1: what listens at 127.0.0.1:{port} ")


def test_different_world_sizes():
    answers = run_ranks(2, nothing, size=[2, 3], timeout_s=10)
    for rank, answer in enumerate(answers):
        assert answer == f"error: rank {rank}: rank 1 came with world size 3, but rank 0 has 2"


def test_two_processes_with_one_rank():
    answers = run_ranks(2, nothing, rank=[0, 0], timeout_s=3)
    assert any("cannot listen" in answer or "two processes" in answer for answer in answers)


def test_different_transports():
    for answer in run_ranks(2, nothing, transport=["auto", "sockets"], timeout_s=10):
        assert "wants the transport" in answer


def test_a_process_that_is_killed_while_it_connects(monkeypatch):
    """Its segment has a name then; the next to start removes it."""
    path = f"/dev/shm/tokenmill-{os.urandom(8).hex()}-0"
    with open(path, "wb") as orphan:
        orphan.truncate(4096)
    assert run_ranks(2, nothing) == [None, None]
    assert not os.path.exists(path)

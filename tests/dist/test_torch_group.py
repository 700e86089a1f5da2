"""Communicators over the send and receive of a process group, here gloo's."""

import time

import numpy as np
import pytest

from tests.dist import test_failures as failures
from tests.dist import test_operations as operations
from tests.dist.processes import WAIT_S, run_ranks, start_ranks
from tokenmill.collectives.communicator import Communicator

torch = pytest.importorskip("torch")


@pytest.fixture
def gloo_file(tmp_path):
    return str(tmp_path / "gloo")


def test_every_operation(gloo_file):
    hosts = ["a", "b", "a"]
    answers = run_ranks(3, operations.every_operation, host_id=hosts, gloo_file=gloo_file)
    assert answers == ["torch.distributed (gloo)"] * 3


def test_every_type(gloo_file):
    assert run_ranks(2, operations.every_type, gloo_file=gloo_file) == ["done"] * 2


def test_messages_and_asynchronous_calls(gloo_file):
    assert run_ranks(2, operations.messages, gloo_file=gloo_file) == ["done"] * 2


def beside_the_group(ranks: Communicator) -> str:
    """The group goes on for its owner, before, meanwhile and after; so does a second one."""
    import torch.distributed as dist

    from tokenmill.collectives.torch.meeting import connect_group

    mine, other = np.ones(300_000), torch.ones(7)
    work = ranks.all_reduce(mine, is_async=True)
    dist.all_reduce(other)
    work.wait()
    for _ in range(2):
        with connect_group(timeout_s=20) as again:
            again.all_reduce(mine)
    dist.all_reduce(other)
    assert (mine == ranks.size**3).all()
    assert (other == ranks.size**2).all()
    ranks.barrier()
    return "done"


def test_the_group_stays_its_owners(gloo_file):
    assert run_ranks(2, beside_the_group, gloo_file=gloo_file) == ["done"] * 2


def in_a_part_of_the_job(ranks: Communicator) -> str:
    import torch.distributed as dist

    from tokenmill.collectives.torch.meeting import connect_group

    pair = dist.new_group([2, 1])
    if ranks.rank == 0:
        with pytest.raises(Exception, match="rank 0 of the job is not in the group"):
            connect_group(pair)
        return "out"
    with connect_group(pair, timeout_s=20) as two:
        value = np.array([two.rank])
        two.broadcast(value, root=1)
        return f"{two.rank} of {two.size}, {value[0]}"


def test_a_group_that_is_a_part_of_the_job(gloo_file):
    answers = run_ranks(3, in_a_part_of_the_job, gloo_file=gloo_file)
    assert answers == ["out", "0 of 2, 1", "1 of 2, 1"]


# -- what goes wrong


def test_ranks_that_do_different_things(gloo_file):
    answers = run_ranks(3, failures.different_types, gloo_file=gloo_file, timeout_s=15)
    for rank, answer in enumerate(answers):
        assert answer.startswith(f"error: rank {rank}: all_reduce of 1000 f"), answer
        assert "\n" not in answer
    assert any(" by sum (call 1) instead" in answer for answer in answers)


def test_a_message_of_the_wrong_length(gloo_file):
    answers = run_ranks(2, failures.wrong_length, gloo_file=gloo_file)
    assert answers[1] == (
        "error: rank 1: send/recv of 12 f32 (tag 0): rank 0 does send/recv of 10 f32 (tag 0) instead"
    )


def test_a_peer_that_is_killed(gloo_file):
    started_s = time.monotonic()
    made, answers = start_ranks(4, failures.die_in_the_middle, gloo_file=gloo_file, timeout_s=50)
    got = dict(answers.get(timeout=WAIT_S)[:2] for _ in range(3))
    for process in made:
        process.join(WAIT_S)
    assert time.monotonic() - started_s < 40, "they waited for the timeout"
    assert [process.exitcode for process in made] == [0, 0, 0, -9]
    for rank in range(3):
        assert got[rank].startswith(f"error: rank {rank}: all_reduce of 1048576 f64 by sum (call ")
        assert "rank 3 has ended" in got[rank]


def test_a_peer_that_does_not_take_part(gloo_file):
    answers = run_ranks(2, failures.never_call, gloo_file=gloo_file, timeout_s=2)
    assert answers[0] == (
        "error: rank 0: all_reduce of 10 f64 by sum (call 1): nothing has come from rank 1 for 2 s"
    )


def test_a_peer_that_leaves(gloo_file):
    answers = run_ranks(2, failures.leave, gloo_file=gloo_file)
    assert answers[0].startswith("error: rank 0: all_reduce of 10 f64 by sum (call 1): rank 1 has ")


def come_late(ranks: Communicator) -> list[str]:
    """A second communicator for which one rank does not come."""
    from tokenmill.collectives.torch.meeting import connect_group

    if ranks.rank == ranks.size - 1:
        time.sleep(3)
        return []
    try:
        connect_group(timeout_s=1)
    except Exception as error:
        return [str(error)]
    return ["connected"]


def test_a_peer_that_never_comes(gloo_file):
    answers = run_ranks(3, come_late, gloo_file=gloo_file)
    for rank in (0, 1):
        assert answers[rank] == [f"rank {rank}: rank 2 of 3 has not come within 1 s"]


def test_a_port_in_use(gloo_file):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        address = f"127.0.0.1:{port}"
        answers = run_ranks(
            2, failures.nothing, gloo_file=gloo_file, address=address, timeout_s=10
        )
    for answer in answers:
        assert f"rank 0: cannot listen on 127.0.0.1:{port}: address already in use" in answer


def test_no_group():
    from tokenmill.collectives.torch.meeting import connect_group

    with pytest.raises(Exception, match="call torch.distributed.init_process_group"):
        connect_group()

"""Operations between processes, over shared memory, sockets and both, held against NumPy."""

import ml_dtypes
import numpy as np
import pytest

from tests.dist.processes import run_ranks, segments
from tokenmill.collectives.catalog import ALGORITHMS
from tokenmill.collectives.communicator import Communicator

HOSTS = {
    "shared memory": ["a", "a", "a"],
    "sockets": ["a", "b", "c"],
    "shared memory and sockets": ["a", "b", "a"],
}
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int8, np.int32, np.int64]


def vector(rank: int, count: int, dtype) -> np.ndarray:
    """Small integers, which every type holds exactly, as do their sums."""
    rng = np.random.default_rng(rank)
    return rng.integers(-3, 4, count).astype(dtype)


def every_operation(ranks: Communicator) -> str:
    p, me = ranks.size, ranks.rank
    for count in (0, 1, 7, 3000, 200_003):
        all_ranks = [vector(r, count, np.float32) for r in range(p)]
        total = sum(all_ranks)
        for _, name in [key for key in ALGORITHMS if key[0] == "all_reduce"]:
            if name in ("hierarchical", "leader") and p % ranks.topology.hosts:
                continue
            mine = all_ranks[me].copy()
            ranks.all_reduce(mine, algorithm=name)
            np.testing.assert_array_equal(mine, total, err_msg=name)
        counts = [count // 2, count - count // 2, 0]
        start = sum(counts[:me])
        block = np.empty(counts[me], np.float32)
        ranks.reduce_scatter(block, all_ranks[me], counts=counts)
        np.testing.assert_array_equal(block, total[start : start + counts[me]])
        whole = np.empty(count, np.float32)
        ranks.all_gather(whole, block, counts=counts)
        np.testing.assert_array_equal(whole, total)
        mine = all_ranks[me].copy()
        ranks.reduce(mine, root=1, op="max")
        wanted = np.maximum.reduce(all_ranks) if me == 1 else all_ranks[me]
        np.testing.assert_array_equal(mine, wanted)
        ranks.broadcast(mine, root=2)
        np.testing.assert_array_equal(mine, all_ranks[2])
        even = np.arange(count // 3 * 3, dtype=np.int64) + 1_000_000 * me
        wanted = [np.split(even + 1_000_000 * (r - me), p)[me] for r in range(p)]
        for name in ("one_shot", "bruck"):
            output = np.empty_like(even)
            ranks.all_to_all(output, even, algorithm=name)
            np.testing.assert_array_equal(output, np.concatenate(wanted), err_msg=name)
        sent = [(count // 4 + r) * (1 + me) for r in range(p)]
        received = [(count // 4 + me) * (1 + r) for r in range(p)]
        output = np.empty(sum(received), np.int32)
        source = np.repeat(np.arange(p, dtype=np.int32) + 10 * me, sent)
        ranks.all_to_all(output, source, send_counts=sent, receive_counts=received)
        wanted = np.repeat(np.arange(p, dtype=np.int32) * 10 + me, received)
        np.testing.assert_array_equal(output, wanted)
    ranks.barrier()
    return ranks.transport_name


@pytest.mark.parametrize("name", HOSTS)
def test_every_operation(name):
    assert run_ranks(3, every_operation, host_id=HOSTS[name])[0] == name
    assert not segments()


def every_type(ranks: Communicator) -> str:
    p, me = ranks.size, ranks.rank
    for dtype in DTYPES:
        all_ranks = [vector(r, 1001, dtype) for r in range(p)]
        wide = [x.astype(np.float64) for x in all_ranks]
        for op, wanted in {
            "sum": sum(wide),
            "prod": np.prod(wide, axis=0),
            "max": np.max(wide, axis=0),
            "min": np.min(wide, axis=0),
            "avg": np.trunc(sum(wide) / p) if np.dtype(dtype).kind == "i" else sum(wide) / p,
        }.items():
            mine = all_ranks[me].copy()
            ranks.all_reduce(mine, op)
            assert mine.dtype == dtype
            np.testing.assert_allclose(mine.astype(np.float64), wanted, rtol=2**-8 if op == "avg" else 0)
    return "done"


def test_every_type():
    assert run_ranks(2, every_type) == ["done"] * 2


def messages(ranks: Communicator) -> str:
    peer = 1 - ranks.rank
    large, got = np.full(1 << 20, ranks.rank), np.empty(1 << 20, np.int64)
    sent = ranks.send(large, peer, is_async=True)  # both send first: neither may wait for the other
    ranks.recv(got, peer)
    sent.wait()
    assert (got == peer).all()
    # Receives in another order than the sends, and a collective in between.
    small = [np.full(3, 10 * ranks.rank + tag) for tag in range(3)]
    works = [ranks.send(small[tag], peer, tag=tag, is_async=True) for tag in range(3)]
    total = np.ones(5)
    works.append(ranks.all_reduce(total, is_async=True))
    for tag in (2, 0, 1):
        message = np.empty(3, np.int64)
        ranks.recv(message, peer, tag=tag)
        assert (message == 10 * peer + tag).all()
    for work in works:
        work.wait()
    assert (total == 2).all()
    strided = np.zeros((4, 6))[:, ::2]
    ranks.broadcast(np.ones((4, 3)) if ranks.rank == 0 else strided)
    assert ranks.rank == 0 or (strided == 1).all()
    return "done"


@pytest.mark.parametrize("hosts", [["a", "a"], ["a", "b"]])
def test_messages_and_asynchronous_calls(hosts):
    assert run_ranks(2, messages, host_id=hosts) == ["done"] * 2


def ordered_bits(ranks: Communicator) -> list[bytes]:
    rng = np.random.default_rng(ranks.rank)
    whole = rng.standard_normal(70_000).astype(np.float32)
    results = []
    for count in (5, 3000, 70_000):
        mine = whole[:count].copy()
        ranks.all_reduce(mine, is_ordered=True)
        results.append(mine[:5].tobytes())
    return results


def test_ordered_reductions_have_bits_that_do_not_depend_on_size():
    answers = run_ranks(3, ordered_bits)
    rows = [np.random.default_rng(r).standard_normal(70_000).astype(np.float32)[:5] for r in range(3)]
    wanted = ((rows[0] + rows[1]) + rows[2]).tobytes()
    assert all(bits == wanted for answer in answers for bits in answer)

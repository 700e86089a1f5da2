"""Timing operations of a communicator as nccl-tests does, and checking what they leave.

A round is `num_iters` calls one after the other; its time a call is that of the slowest rank. What
is reduced are small integers, so that results are exact in every type.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tokenmill.collectives.arithmetic import Array, DataType
from tokenmill.collectives.communicator import Communicator

MEASURED_OPS = ("all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one operation and size: seconds a call, and elements that were wrong, over all ranks."""

    time_s: float
    num_wrong: int


def measure(
    ranks: Communicator, op: str, count: int, dtype: DataType, *, num_iters: int, num_rounds: int
) -> Measured:
    """The best round. `count` is that of the full vector, a multiple of the number of ranks."""
    call, check = _make_call(ranks, op, count, dtype)
    call()
    num_wrong = check()
    return measure_call(ranks, call, num_wrong, num_iters=num_iters, num_rounds=num_rounds)


def measure_call(
    ranks: Communicator,
    call: Callable[[], object],
    num_wrong: int,
    *,
    num_iters: int,
    num_rounds: int,
) -> Measured:
    """Time any function that all ranks call; `num_wrong` is this rank's."""
    wrong = np.array([num_wrong], np.int64)
    ranks.all_reduce(wrong)
    for _ in range(max(1, num_iters // 5)):
        call()
    best_s = float("inf")
    for _ in range(num_rounds):
        ranks.barrier()
        start_s = time.perf_counter()
        for _ in range(num_iters):
            call()
        round_s = np.array([(time.perf_counter() - start_s) / num_iters])
        ranks.all_reduce(round_s, "max")
        best_s = min(best_s, float(round_s[0]))
    return Measured(time_s=best_s, num_wrong=int(wrong[0]))


def sample(rank: int, count: int, dtype: DataType) -> Array:
    """What a rank has: integers from 0 to 3."""
    return ((np.arange(count) + 3 * rank) % 4).astype(dtype.numpy)


def _make_call(
    ranks: Communicator, op: str, count: int, dtype: DataType
) -> tuple[Callable[[], object], Callable[[], int]]:
    """The call, and what counts the wrong elements after the first."""
    p, me = ranks.size, ranks.rank
    block = count // p
    mine = sample(me, count, dtype)
    data, part = mine.copy(), np.empty(block, dtype.numpy)
    everyone = [sample(r, count, dtype) for r in range(p)]
    total = np.sum([x.astype(np.float64) for x in everyone], axis=0).astype(dtype.numpy)
    own = slice(me * block, (me + 1) * block)
    if op == "all_reduce":
        return lambda: ranks.all_reduce(data), lambda: _num_wrong(data, total)
    if op == "reduce":
        wanted = total if me == 0 else mine
        return lambda: ranks.reduce(data), lambda: _num_wrong(data, wanted)
    if op == "broadcast":
        return lambda: ranks.broadcast(data), lambda: _num_wrong(data, everyone[0])
    if op == "reduce_scatter":
        return lambda: ranks.reduce_scatter(part, mine), lambda: _num_wrong(part, total[own])
    if op == "all_gather":
        wanted = np.concatenate([x[:block] for x in everyone])
        return lambda: ranks.all_gather(data, mine[:block]), lambda: _num_wrong(data, wanted)
    wanted = np.concatenate([x[own] for x in everyone])
    return lambda: ranks.all_to_all(data, mine), lambda: _num_wrong(data, wanted)


def _num_wrong(got: Array, wanted: Array) -> int:
    return int(np.count_nonzero(got != wanted))

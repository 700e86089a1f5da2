"""Every algorithm does its task, for every number of ranks and every shape.

All numbers up to 64 in all shapes take minutes, so here they are all up to 16 and samples beyond;
TOKENMILL_TEST_ALL_SHAPES=1 leaves nothing out.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.collectives.programs import divisors, least_ranks, make_task, plans
from tokenmill.collectives.catalog import ALGORITHMS, write_program
from tokenmill.collectives.program import Plan
from tokenmill.collectives.prove import prove
from tokenmill.collectives.task import BLOCK_OPS, Task

KEYS = list(ALGORITHMS)
MOST_RANKS = 64
ALL_SHAPES = os.environ.get("TOKENMILL_TEST_ALL_SHAPES") == "1"


def prove_shapes(key, ranks, *, stride=1):
    """All shapes with so many ranks; with a stride, one in so many, in turn."""
    algorithm = ALGORITHMS[key]
    if ranks < least_ranks(algorithm.op):
        return
    task = make_task(algorithm.op, ranks, ranks + ranks // 3, root=ranks // 2)
    shapes = list(plans(algorithm, ranks))
    for plan in shapes[ranks % min(stride, len(shapes)) :: stride]:
        proof = prove(write_program(task, plan))
        assert ranks == 1 or proof.is_ordered == algorithm.is_ordered


@pytest.mark.parametrize("key", KEYS, ids="-".join)
def test_few_ranks_of_all_sizes(key):
    algorithm = ALGORITHMS[key]
    for ranks in range(least_ranks(algorithm.op), 9):
        for count in (0, 1, ranks - 1, 2 * ranks + 3):
            task = make_task(algorithm.op, ranks, count, root=ranks // 2)
            for plan in plans(algorithm, ranks):
                for slices in (1, 3):
                    prove(write_program(task, replace(plan, slices=slices)))


@pytest.mark.parametrize("key", KEYS, ids="-".join)
def test_every_shape_of_some_ranks(key):
    for ranks in range(9, 17):
        prove_shapes(key, ranks)


@pytest.mark.parametrize("key", KEYS, ids="-".join)
def test_some_shapes_of_more_ranks(key):
    for ranks in range(17 + KEYS.index(key) % 8, MOST_RANKS + 1, 12):
        prove_shapes(key, ranks, stride=8)


@pytest.mark.slow
@pytest.mark.skipif(not ALL_SHAPES, reason="takes minutes; set TOKENMILL_TEST_ALL_SHAPES=1")
def test_every_number_of_ranks_and_every_shape():
    cases = [(key, ranks) for ranks in range(MOST_RANKS, 0, -1) for key in KEYS]
    with ProcessPoolExecutor() as pool:
        for _ in pool.map(prove_shapes, *zip(*cases, strict=True), chunksize=4):
            pass


@pytest.mark.parametrize("key", [k for k in KEYS if k[0] in ("broadcast", "reduce")], ids="-".join)
def test_every_root(key):
    for ranks in (2, 5, 8):
        for root in range(ranks):
            task = make_task(key[0], ranks, 7, root=root)
            prove(write_program(task, Plan(algorithm=key[1])))


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_algorithm_of_any_size_in_any_order(data):
    key = data.draw(st.sampled_from(KEYS))
    algorithm = ALGORITHMS[key]
    ranks = data.draw(st.integers(least_ranks(algorithm.op), 40))
    root = data.draw(st.integers(0, ranks - 1))
    task = make_task(algorithm.op, ranks, data.draw(st.integers(0, 3 * ranks)), root)
    if algorithm.op in BLOCK_OPS:
        counts = data.draw(st.lists(st.integers(0, 5), min_size=ranks, max_size=ranks))
        task = Task(op=algorithm.op, ranks=ranks, count=sum(counts), counts=tuple(counts))
    plan = Plan(
        algorithm=algorithm.name,
        slices=data.draw(st.integers(1, 4)),
        hosts=data.draw(st.sampled_from(divisors(ranks))),
        order=tuple(data.draw(st.permutations(range(ranks)))),
    )
    prove(write_program(task, plan))


@given(data=st.data())
@settings(max_examples=4, deadline=None)
def test_many_ranks(data):
    key = data.draw(st.sampled_from([k for k in KEYS if k[1] not in ("one_shot", "two_shot")]))
    algorithm = ALGORITHMS[key]
    ranks = data.draw(st.integers(65, 130))
    plan = Plan(algorithm=algorithm.name, hosts=data.draw(st.sampled_from(divisors(ranks))))
    prove(write_program(make_task(algorithm.op, ranks, ranks), plan))


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_all_to_all_of_any_sizes(data):
    ranks = data.draw(st.integers(1, 7))
    counts = data.draw(st.lists(st.integers(0, 3), min_size=ranks**2, max_size=ranks**2))
    task = Task(op="all_to_all", ranks=ranks, counts=tuple(counts))
    slices = data.draw(st.integers(1, 2))
    prove(write_program(task, Plan(algorithm="one_shot", slices=slices)))

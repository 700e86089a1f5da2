"""Steps and bytes are those of the table, and trees and orders have the properties they need."""

from math import ceil, log2

import pytest

from tests.unit.collectives.programs import make_task
from tokenmill.collectives.algorithms import tree
from tokenmill.collectives.catalog import (
    ALGORITHMS,
    algorithms_of,
    write_program,
    write_rank,
)
from tokenmill.collectives.program import Plan, RecvReduce, Reduce, Send
from tokenmill.collectives.prove import prove
from tokenmill.collectives.task import Task
from tokenmill.errors import UsageError

RANKS = (2, 3, 8, 12, 16)


def proof_of(op, algorithm, ranks, count, **plan):
    return prove(write_program(make_task(op, ranks, count), Plan(algorithm=algorithm, **plan)))


@pytest.mark.parametrize("p", RANKS)
def test_rings(p):
    n = 8 * p
    for op, times in (("all_reduce", 2), ("reduce_scatter", 1), ("all_gather", 1)):
        proof = proof_of(op, "ring", p, n)
        assert proof.num_steps == times * (p - 1)
        assert proof.most_sent == times * (p - 1) * n // p


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("k", [1, 4])
def test_chains(p, k):
    for op in ("broadcast", "reduce"):
        proof = proof_of(op, "ring", p, 8 * p, slices=k)
        assert proof.num_steps == p + k - 2
        assert proof.most_sent == 8 * p


@pytest.mark.parametrize(("h", "m"), [(2, 2), (3, 4), (4, 3), (2, 8), (8, 2), (1, 6), (6, 1)])
def test_hierarchical(h, m):
    p, n = h * m, 4 * h * m
    proof = proof_of("all_reduce", "hierarchical", p, n, hosts=h)
    assert proof.num_steps == 2 * (m - 1) + 2 * (h - 1)
    assert proof.most_sent == 2 * (m - 1) * n // m + 2 * (h - 1) * n // (h * m)
    assert proof_of("all_reduce", "leader", p, n, hosts=h).num_steps == proof.num_steps


@pytest.mark.parametrize(("x", "y"), [(4, 4), (3, 5), (5, 3), (2, 6), (1, 7), (7, 1)])
def test_torus(x, y):
    p, n = x * y, 4 * x * y
    proof = proof_of("all_reduce", "torus", p, n, width=x)
    assert proof.num_steps == 2 * (x + y - 2)
    assert proof.most_sent == 2 * (p - 1) * n // p


@pytest.mark.parametrize("p", [2, 4, 8, 16, 32])
def test_doubling(p):
    n = 4 * p
    proof = proof_of("all_reduce", "recursive_doubling", p, n)
    assert (proof.num_steps, proof.most_sent) == (log2(p), n * log2(p))
    proof = proof_of("all_reduce", "rabenseifner", p, n)
    assert (proof.num_steps, proof.most_sent) == (2 * log2(p), 2 * (p - 1) * n // p)


@pytest.mark.parametrize("p", [3, 5, 6, 7, 9, 12, 24, 33])
def test_doubling_of_other_numbers_takes_one_step_more_at_most(p):
    steps = ceil(log2(p))
    assert steps <= proof_of("all_reduce", "recursive_doubling", p, p).num_steps <= steps + 1
    assert proof_of("all_reduce", "rabenseifner", p, 2 * p).num_steps <= 2 * steps


@pytest.mark.parametrize("p", RANKS)
def test_shots(p):
    n = 2 * p
    proof = proof_of("all_reduce", "one_shot", p, n)
    assert (proof.num_steps, proof.most_sent) == (1, (p - 1) * n)
    proof = proof_of("all_reduce", "two_shot", p, n)
    assert (proof.num_steps, proof.most_sent) == (2, 2 * (p - 1) * n // p)


@pytest.mark.parametrize("p", [2, 3, 5, 8, 12, 16])
def test_bruck(p):
    proof = proof_of("all_to_all", "bruck", p, 2 * p)
    assert proof.num_steps == int(log2(p))
    assert proof.most_sent == 2 * sum(slot.bit_count() for slot in range(p))
    task = Task(op="all_to_all", ranks=p, counts=(1,) * p**2)
    with pytest.raises(UsageError, match="bruck: it cannot have blocks of given sizes"):
        write_rank(task, Plan(algorithm="bruck"), 0)


@pytest.mark.parametrize("p", [2, 3, 4, 6, 7, 8, 13, 16, 30])
def test_tree(p):
    n = 4 * p
    proof = proof_of("all_reduce", "tree", p, n)
    assert proof.num_steps == 2 * (ceil(log2(p)) if p % 2 == 0 else int(log2(p)))
    assert proof.most_sent <= 2 * n


@pytest.mark.parametrize("p", range(1, 201))
def test_no_rank_is_an_inner_node_of_both_trees(p):
    inner = []
    for which in tree.TREES:
        nodes = [tree.node(place, p, which) for place in range(p)]
        assert sum(node.parent < 0 for node in nodes) == 1
        for place, node in enumerate(nodes):
            assert len(node.children) <= 2
            assert all(nodes[child].parent == place for child in node.children)
        inner.append({place for place, node in enumerate(nodes) if node.children})
    assert not inner[0] & inner[1]


def test_sums_are_in_order_of_rank():
    """Rank 0 first, and each result starts from rank 0's contribution."""
    for algorithm in ALGORITHMS.values():
        if not algorithm.is_ordered:
            continue
        program = write_program(make_task(algorithm.op, 5, 10), Plan(algorithm=algorithm.name))
        for here in program.ranks:
            added = [
                here.rank if isinstance(step, Reduce) else step.peer
                for step in here.steps
                if isinstance(step, RecvReduce | Reduce)
            ]
            assert added in ([], [1, 2, 3, 4])


def test_one_rank_can_be_written_alone():
    task = Task(op="all_reduce", ranks=24_576, count=24_576)
    here = write_rank(task, Plan(algorithm="hierarchical", hosts=4_096), 7)
    assert sum(isinstance(step, Send) for step in here.steps) == 8_200


def test_an_order_says_who_is_neighbour_of_whom():
    order = (0, 2, 1, 3)
    program = write_program(make_task("all_reduce", 4, 8), Plan(algorithm="ring", order=order))
    sends = {
        here.rank: {s.peer for s in here.steps if isinstance(s, Send)} for here in program.ranks
    }
    assert sends == {0: {2}, 2: {1}, 1: {3}, 3: {0}}


def test_every_operation_has_an_algorithm():
    for op in ("all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter"):
        assert {a.name for a in algorithms_of(op)} >= {"ring", "one_shot"}
    for op in ("all_to_all", "send_recv", "barrier"):
        assert algorithms_of(op)


@pytest.mark.parametrize(
    ("task", "plan", "message"),
    [
        ({"op": "allreduce"}, {}, "no collective 'allreduce': give one of all_reduce, reduce"),
        ({"ranks": 0}, {}, "all_reduce over 0 ranks: there must be at least 1"),
        ({"count": -1}, {}, "all_reduce of -1 elements"),
        ({"op": "reduce", "root": 6}, {}, "reduce: root is 6, but ranks are 0 to 5"),
        ({"op": "send_recv"}, {}, "send_recv: rank 0 cannot send to itself"),
        ({"op": "barrier"}, {}, "a barrier has no elements, but 12 were given"),
        ({"op": "all_gather", "counts": (1, 2)}, {}, "all_gather: 2 sizes of blocks, not 6"),
        ({"op": "all_gather", "counts": (2,) * 5 + (3,)}, {}, "13 elements in a vector of 12"),
        ({"counts": (2,) * 6}, {}, "all_reduce takes no sizes of blocks"),
        ({}, {"algorithm": "rings"}, "no algorithm 'rings': give one of ring, hierarchical"),
        ({}, {"algorithm": "hierarchical", "hosts": 4}, "6 ranks cannot be spread evenly over 4"),
        ({}, {"algorithm": "torus", "width": 4}, "6 ranks cannot stand in rows of 4"),
        ({}, {"slices": 0}, "slices is 0, but must be at least 1"),
        ({}, {"order": (0, 1, 2)}, "the order must name each of the ranks 0 to 5 once"),
    ],
)
def test_bad_input(task, plan, message):
    with pytest.raises(UsageError) as refused:
        write_program(
            Task(**{"op": "all_reduce", "ranks": 6, "count": 12, **task}),
            Plan(**{"algorithm": "ring", **plan}),
        )
    assert message in str(refused.value)

"""Every algorithm does its task; and the prover finds what is wrong with a program."""

from dataclasses import replace

import pytest

from tests.unit.collectives.programs import least_ranks, make_task, plans
from tokenmill.collectives.catalog import ALGORITHMS, write_program
from tokenmill.collectives.program import Plan
from tokenmill.collectives.prove import prove

KEYS = list(ALGORITHMS)


@pytest.mark.parametrize("key", KEYS, ids="-".join)
def test_few_ranks_of_all_sizes(key):
    algorithm = ALGORITHMS[key]
    for ranks in range(least_ranks(algorithm.op), 9):
        for count in (0, 1, ranks - 1, 2 * ranks + 3):
            task = make_task(algorithm.op, ranks, count, root=ranks // 2)
            for plan in plans(algorithm, ranks):
                for slices in (1, 2, 3):
                    prove(write_program(task, replace(plan, slices=slices)))


def test_ring_takes_its_steps():
    proof = prove(write_program(make_task("all_reduce", 8, 64), Plan(algorithm="ring")))
    assert (proof.num_steps, proof.most_sent) == (14, 2 * 7 * 64 // 8)

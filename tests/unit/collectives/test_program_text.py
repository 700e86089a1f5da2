"""The text form is exact both ways, and says what it cannot read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.collectives.programs import least_ranks, make_task, plans
from tokenmill.collectives.catalog import ALGORITHMS, write_program
from tokenmill.collectives.program import (
    Buffer,
    Chunk,
    Copy,
    Plan,
    Program,
    RankProgram,
    Recv,
    RecvReduce,
    Reduce,
    Send,
)
from tokenmill.collectives.task import Task
from tokenmill.collectives.text import ProgramSyntaxError, parse, print_program

TEXT = """\
program all_reduce by ring {
  task {ranks=2, count=8}
  plan {}
  rank 0 {
    buffer data[8]
    0: send data[4:8] to 1 tag 0
    1: recv_reduce data[0:4] from 1 tag 0
    2: send data[0:4] to 1 tag 0 after 1
    3: recv data[4:8] from 1 tag 0 after 0
  }
  rank 1 {
    buffer data[8]
    0: send data[0:4] to 0 tag 0
    1: recv_reduce data[4:8] from 0 tag 0
    2: send data[4:8] to 0 tag 0 after 1
    3: recv data[0:4] from 0 tag 0 after 0
  }
}
"""


def test_a_ring_of_two():
    program = write_program(Task(op="all_reduce", ranks=2, count=8), Plan(algorithm="ring"))
    assert print_program(program) == TEXT
    assert parse(TEXT) == program


@pytest.mark.parametrize("key", list(ALGORITHMS), ids="-".join)
def test_every_algorithm_comes_back(key):
    algorithm = ALGORITHMS[key]
    for ranks in range(least_ranks(algorithm.op), 7):
        for plan in plans(algorithm, ranks):
            program = write_program(make_task(algorithm.op, ranks, 11, root=ranks - 1), plan)
            assert parse(print_program(program)) == program


numbers = st.integers(0, 10**6)
chunks = st.builds(
    Chunk,
    st.from_regex(r"[a-z]\w{0,5}", fullmatch=True).filter(str.isascii),
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=3).map(tuple),
)
after = st.lists(numbers, max_size=3).map(tuple)
steps = st.one_of(
    *(st.builds(kind, chunks, numbers, numbers, after) for kind in (Send, Recv, RecvReduce)),
    *(st.builds(kind, chunks, chunks, after) for kind in (Copy, Reduce)),
)
rank_programs = st.builds(
    RankProgram,
    numbers,
    st.lists(st.builds(Buffer, st.just("data"), numbers, st.booleans()), max_size=2).map(tuple),
    st.lists(steps, max_size=4).map(tuple),
)


@given(ranks=st.lists(rank_programs, max_size=3), order=st.permutations(range(3)))
@settings(max_examples=40, deadline=None)
def test_any_program_comes_back(ranks, order):
    task = Task(op="all_gather", ranks=3, count=6, counts=(1, 2, 3))
    program = Program(task, Plan(algorithm="any", slices=2, order=tuple(order)), tuple(ranks))
    assert parse(print_program(program)) == program


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("all_reduce by", "all_reduce with", "line 1: expected program OP by ALGORITHM {"),
        ("{ranks=2, count=8}", "{ranks=2, cuont=8}", "line 2: expected fields such as"),
        ("{ranks=2, count=8}", "{ranks='2', count=8}", "line 2: expected fields such as"),
        ("{ranks=2, count=8}", "{ranks=0, count=8}", "line 2: all_reduce over 0 ranks"),
        ("0: send", "1: send", "line 6: expected 0: send CHUNK to ..."),
        ("send data[4:8] to", "send data[4:8] from", "line 6: expected 0: send CHUNK to ..."),
        ("data[4:8] to", "data[4:] to", "line 6: expected ranges such as [0:4,8:12]"),
        ("after 1", "after one", "line 8: expected 2: STEP"),
        ("  }\n}", "  }", "the text ends where rank or } was expected"),
        ("  }\n}", "  }\n}\nmore", "line 19: expected the end of the text"),
    ],
)
def test_what_cannot_be_read(old, new, message):
    with pytest.raises(ProgramSyntaxError) as refused:
        parse(TEXT.replace(old, new, 1) if old != "  }\n}" else TEXT.replace(old, new))
    assert message in str(refused.value)

"""A trace shows every message once, and ends with what the task promises."""

import pytest

from tests.unit.collectives.programs import make_task, plans
from tokenmill.collectives.catalog import ALGORITHMS, write_program
from tokenmill.collectives.draw import draw_svg, draw_text
from tokenmill.collectives.program import Plan
from tokenmill.collectives.prove import prove
from tokenmill.collectives.trace import trace


@pytest.mark.parametrize("key", list(ALGORITHMS), ids="-".join)
def test_every_algorithm_can_be_followed(key):
    op, _ = key
    for plan in plans(ALGORITHMS[key], 6):
        program = write_program(make_task(op, 6, 24), plan)
        proof, shown = prove(program), trace(program)
        assert len(shown.frames) == proof.num_steps + 1
        assert sum(len(frame.messages) for frame in shown.frames) == proof.num_messages
        text, picture = draw_text(shown), draw_svg(shown, "a title")
        assert text.count(" -> ") == picture.count('class="arrow') == proof.num_messages
        assert f"step {proof.num_steps}\n" in text


def test_what_is_held_grows_to_everything():
    shown = trace(write_program(make_task("all_reduce", 4, 4), Plan(algorithm="ring")))
    assert shown.parts == ((0, 1), (1, 2), (2, 3), (3, 4))
    assert shown.frames[0].holdings == tuple((frozenset({rank}),) * 4 for rank in range(4))
    assert shown.frames[-1].holdings == ((frozenset(range(4)),) * 4,) * 4


def test_what_a_barrier_knows():
    program = write_program(make_task("barrier", 3, 0), Plan(algorithm="recursive_doubling"))
    known = [[set(held[0]) for held in frame.holdings] for frame in trace(program).frames]
    assert known == [[{0}, {1}, {2}], [{0, 2}, {0, 1}, {1, 2}], [{0, 1, 2}] * 3]

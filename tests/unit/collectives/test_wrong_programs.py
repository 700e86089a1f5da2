"""The prover finds what is wrong with a program, and says where."""

from dataclasses import replace

import pytest

from tokenmill.collectives.catalog import write_program
from tokenmill.collectives.legality import ProofError
from tokenmill.collectives.program import Buffer, Chunk, Copy, Plan, Recv, RecvReduce, Send
from tokenmill.collectives.prove import prove
from tokenmill.collectives.task import Task
from tokenmill.collectives.text import parse


def ring(ranks=3, op="all_reduce"):
    return write_program(Task(op=op, ranks=ranks, count=2 * ranks), Plan(algorithm="ring"))


def changed(program, rank, change):
    """The program with other steps at one rank."""
    here = program.ranks[rank]
    there = replace(here, steps=tuple(change(list(here.steps))))
    return replace(program, ranks=(*program.ranks[:rank], there, *program.ranks[rank + 1 :]))


def with_step(index, **fields):
    def change(steps):
        steps[index] = replace(steps[index], **fields)
        return steps

    return change


def refusal(program):
    with pytest.raises(ProofError) as refused:
        prove(program)
    return str(refused.value)


def test_a_lost_dependency_is_a_race():
    program = changed(ring(), 1, with_step(2, after=()))
    assert refusal(program) == "rank 1, step 2: it races with step 1"


def test_a_message_that_nobody_receives():
    last = Send(Chunk("data", ((0, 1),)), 1, 9, tuple(range(8)))
    program = changed(ring(), 0, lambda steps: [*steps, last])
    assert refusal(program).endswith("rank 1 does not receive this (tag 9)")


def test_a_message_that_nobody_sends():
    last = Recv(Chunk("data", ((0, 1),)), 1, 9, tuple(range(8)))
    program = changed(ring(), 0, lambda steps: [*steps, last])
    assert refusal(program).endswith("rank 1 does not send this (tag 9)")


def test_messages_of_another_size():
    program = changed(ring(), 0, with_step(0, chunk=Chunk("data", ((4, 5),))))
    assert refusal(program) == "rank 0, step 0: rank 1 expects 2 elements in step 1, 1 are sent"


def test_the_wrong_elements():
    text = """
    program reduce by ring {
      task {ranks=2, count=2}
      plan {}
      rank 0 {
        buffer data[2]
        0: recv_reduce data[1:2] from 1 tag 0
      }
      rank 1 {
        buffer data[2]
        0: send data[0:1] to 0 tag 0
      }
    }
    """
    assert refusal(parse(text)) == "rank 0, step 0: it adds elements of different numbers"


def test_a_contribution_that_comes_twice():
    text = """
    program all_reduce by ring {
      task {ranks=2, count=1}
      plan {}
      rank 0 {
        buffer data[1]
        0: send data[0:1] to 1 tag 0
        1: send data[0:1] to 1 tag 1
        2: recv data[0:1] from 1 tag 0 after 0, 1
      }
      rank 1 {
        buffer data[1]
        0: recv_reduce data[0:1] from 0 tag 0
        1: recv_reduce data[0:1] from 0 tag 1 after 0
        2: send data[0:1] to 0 tag 0 after 1
      }
    }
    """
    assert refusal(parse(text)) == "rank 1, step 1: the contribution of rank 0 comes in twice"


def test_a_contribution_that_is_missing():
    program = changed(ring(), 2, lambda steps: steps[:-1])
    program = changed(program, 1, lambda steps: steps[:-2] + steps[-1:])
    assert "ends with" in refusal(program) or "does not" in refusal(program)


def test_a_result_that_is_not_one():
    program = ring(op="reduce_scatter")
    whole = replace(program, task=replace(program.task, op="all_reduce"))
    message = refusal(whole)
    assert message.startswith("rank 0: data[2:4] ends with")
    assert message.endswith("not the sum of ranks 0, 1, 2")


def test_elements_that_hold_nothing():
    program = write_program(Task(op="all_gather", ranks=2, count=2), Plan(algorithm="ring"))
    first = program.ranks[0].steps[1]
    program = changed(
        program,
        0,
        lambda steps: [steps[0], RecvReduce(first.chunk, first.peer, first.tag, first.after)],
    )
    assert refusal(program) == "rank 0, step 1: it reduces elements that hold nothing"


def exchange(first_of_1):
    """Two ranks that swap an element through scratch; rank 1 sends or receives first."""
    steps = ["send data[0:1] to 0 tag 0", "recv heard[0:1] from 0 tag 0"]
    if first_of_1 == "recv":
        steps.reverse()
    return f"""
    program all_reduce by ring {{
      task {{ranks=2, count=1}}
      plan {{}}
      rank 0 {{
        buffer data[1]
        buffer heard[1]
        0: recv heard[0:1] from 1 tag 0
        1: send data[0:1] to 1 tag 0{" after 0" if first_of_1 == "recv" else ""}
        2: reduce heard[0:1] into data[0:1] after 0, 1
      }}
      rank 1 {{
        buffer data[1]
        buffer heard[1]
        0: {steps[0]}
        1: {steps[1]}{" after 0" if first_of_1 == "recv" else ""}
        2: reduce heard[0:1] into data[0:1] after 0, 1
      }}
    }}
    """


def test_a_deadlock():
    assert "deadlock" in refusal(parse(exchange("recv")))
    assert prove(parse(exchange("send"))).num_steps == 1


def test_a_deadlock_without_buffers():
    """Both overwrite in place what they have sent: with nowhere to put a message, neither can."""
    text = """
    program all_reduce by ring {
      task {ranks=2, count=1}
      plan {}
      rank 0 {
        buffer data[1]
        0: send data[0:1] to 1 tag 0
        1: recv_reduce data[0:1] from 1 tag 0 after 0
      }
      rank 1 {
        buffer data[1]
        0: send data[0:1] to 0 tag 0
        1: recv_reduce data[0:1] from 0 tag 0 after 0
      }
    }
    """
    assert "deadlock without buffers" in refusal(parse(text))


def test_a_barrier_that_lets_one_leave_early():
    program = write_program(Task(op="barrier", ranks=4), Plan(algorithm="recursive_doubling"))
    for rank in range(4):
        program = changed(program, rank, lambda steps: steps[:3])
    assert refusal(program) == "rank 0 may leave before rank 1 has entered"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peer": 0}, "it has no peer 0"),
        ({"peer": 3}, "it has no peer 3"),
        ({"after": (0,)}, "it may wait for earlier steps only"),
        ({"chunk": Chunk("data", ())}, "a chunk is empty"),
        ({"chunk": Chunk("data", ((2, 2),))}, "a chunk is empty"),
        ({"chunk": Chunk("data", ((2, 4), (3, 5)))}, "must ascend without overlap"),
        ({"chunk": Chunk("data", ((5, 7),))}, "goes beyond the end of 'data'"),
        ({"chunk": Chunk("date", ((0, 2),))}, "there is no buffer 'date'"),
    ],
)
def test_malformed_steps(fields, message):
    assert message in refusal(changed(ring(), 0, with_step(0, **fields)))


def test_a_wide_buffer_does_not_travel():
    program = ring()
    wide = tuple(
        replace(here, buffers=(Buffer("data", 6, is_wide=True),)) for here in program.ranks
    )
    assert "a wide buffer never travels" in refusal(replace(program, ranks=wide))


def test_copies_fit():
    step = Copy(Chunk("data", ((0, 2),)), Chunk("data", ((2, 3),)))
    program = changed(ring(), 0, lambda steps: [step, *steps])
    assert "2 elements do not fit into 1" in refusal(program)

"""Prompts get what the next tokens of others leave of the time of a step."""

import numpy as np
import pytest
from fake_model import FakeModel, expected_output, make_limits
from test_scheduler import sequence

from tokenmill.backends.base import StepOutput
from tokenmill.config import EngineConfig
from tokenmill.engine.prompt_budget import PromptBudget
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.step import Step
from tokenmill.engine.step_loop import StepLoop
from tokenmill.errors import UsageError


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def take_step(budget: PromptBudget, clock: Clock, scheduler: Scheduler, elapsed_s: float) -> Step:
    """Plan, run and commit a step that takes so long."""
    step = scheduler.schedule(budget.tokens())
    assert step is not None
    budget.note_posted(step)
    clock.now_s += elapsed_s
    budget.note_ended()
    rows = sum(chunk.num_rows for chunk in step.chunks)
    scheduler.commit(step, StepOutput(tokens=np.full(rows, 5, np.int32), logits=None))
    return step


def test_nothing_is_limited_while_nobody_waits_for_a_token() -> None:
    scheduler = Scheduler(make_limits(tokens=16))
    scheduler.add(sequence(40))
    step = scheduler.schedule(prompt_budget=3)
    assert step is not None
    assert step.num_tokens == 16


def test_prompts_get_the_budget_beside_those_that_go_on() -> None:
    scheduler = Scheduler(make_limits(tokens=16))
    scheduler.add(sequence(4))
    assert scheduler.schedule() is not None
    scheduler.add(sequence(40, start=100))
    step = scheduler.schedule(prompt_budget=3)
    assert step is not None
    assert [(chunk.start, chunk.length) for chunk in step.chunks] == [(4, 1), (0, 3)]
    assert step.num_next_tokens == 1


def test_the_budget_is_what_measured_steps_leave_of_the_target() -> None:
    clock, scheduler = Clock(), Scheduler(make_limits(tokens=64))
    budget = PromptBudget(0.050, least=4, clock=clock)
    assert budget.tokens() is None  # nothing is known
    scheduler.add(sequence(20))
    take_step(budget, clock, scheduler, 0.020)
    assert budget.tokens() == 50  # a token of a prompt takes 1 ms
    take_step(budget, clock, scheduler, 0.030)
    assert budget.tokens() == 20  # 30 ms go to the next token
    scheduler.add(sequence(100, start=100))
    step = take_step(budget, clock, scheduler, 0.050)
    assert (step.num_next_tokens, step.num_tokens) == (1, 21)
    assert budget.tokens() == 20


def test_prompts_always_get_on() -> None:
    clock, scheduler = Clock(), Scheduler(make_limits(tokens=64))
    budget = PromptBudget(0.010, least=4, clock=clock)
    scheduler.add(sequence(20))
    for _ in range(3):
        take_step(budget, clock, scheduler, 0.5)
    assert budget.tokens() == 4


def test_all_sequences_end_under_the_smallest_budget() -> None:
    model = FakeModel(make_limits(tokens=64))
    loop = StepLoop(model, prompt_budget=PromptBudget(1e-9, least=1))
    sequences = [sequence(10 + 30 * i, start=i, max_tokens=6) for i in range(4)]
    for added in sequences:
        loop.scheduler.add(added)
    while loop.has_work:
        loop.turn()
        loop.scheduler.check()
    assert [s.tokens[s.prompt_len :] for s in sequences] == list(map(expected_output, sequences))


@pytest.mark.parametrize("target", [0, -1.0, float("nan")])
def test_a_target_must_be_positive(target: float) -> None:
    with pytest.raises(UsageError, match="target_itl_ms"):
        EngineConfig(target_itl_ms=target)

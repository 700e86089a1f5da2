"""The scheduler and the step loop, without threads or text, on a fake model."""

from dataclasses import dataclass, field

import pytest
from fake_model import FakeModel, expected_output, make_limits
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.backends.base import StepLimits
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.sequence import Sequence, make_sequence
from tokenmill.engine.step_loop import StepLoop
from tokenmill.errors import CapacityError, UsageError
from tokenmill.sampling.params import SamplingParams


def sequence(
    prompt_len: int,
    *,
    limits: StepLimits | None = None,
    eos_ids: tuple[int, ...] = (),
    max_model_len: int = 10_000,
    start: int = 0,
    **params: object,
) -> Sequence:
    limits = limits or make_limits()
    return make_sequence(
        "the prompt",
        [(start + 7 * i) % limits.vocab_size for i in range(prompt_len)],
        SamplingParams(**params),
        seed=start,
        eos_ids=eos_ids,
        limits=limits,
        max_model_len=max_model_len,
    )


def lengths(scheduler: Scheduler) -> list[tuple[int, int]]:
    """(start, length) of each chunk of the next step."""
    step = scheduler.schedule()
    return [(c.start, c.length) for c in step.chunks] if step else []


def run(loop: StepLoop) -> None:
    while loop.has_work:
        loop.turn()
        loop.scheduler.check()


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    scheduler = Scheduler(make_limits(tokens=16))
    scheduler.add(sequence(40))
    assert [lengths(scheduler) for _ in range(4)] == [[(0, 16)], [(16, 16)], [(32, 8)], [(40, 1)]]


def test_running_sequences_come_before_new_prompts() -> None:
    scheduler = Scheduler(make_limits(tokens=16))
    scheduler.add(sequence(4))
    scheduler.add(sequence(20))
    assert lengths(scheduler) == [(0, 4), (0, 12)]
    assert lengths(scheduler) == [(4, 1), (12, 8)]
    assert lengths(scheduler) == [(5, 1), (20, 1)]


def test_only_a_sequence_that_catches_up_samples() -> None:
    scheduler = Scheduler(make_limits(tokens=16))
    first, second = sequence(4), sequence(20)
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.schedule().sampled == [first]
    assert scheduler.schedule().sampled == [first, second]


def test_nobody_overtakes_a_prompt_that_waits_for_room() -> None:
    scheduler = Scheduler(make_limits(blocks=4, tokens=16))
    running, large, small = sequence(20), sequence(40, start=1), sequence(1, start=2)
    scheduler.add(running)
    scheduler.schedule()
    for each in (large, small):
        scheduler.add(each)
    scheduler.schedule()
    assert scheduler.running == [running]
    assert scheduler.waiting == [large, small]


def test_no_more_sequences_run_than_there_are_slots() -> None:
    scheduler = Scheduler(make_limits(slots=2))
    for _ in range(3):
        scheduler.add(sequence(1))
    assert len(lengths(scheduler)) == 2


def test_the_youngest_makes_room_for_the_oldest() -> None:
    limits = make_limits(blocks=4, tokens=64)
    model = FakeModel(limits)
    loop = StepLoop(model)
    old, young = sequence(17, max_tokens=30), sequence(16, start=5, max_tokens=30)
    wanted = [expected_output(each) for each in (old, young)]
    loop.scheduler.add(old)
    loop.scheduler.add(young)
    while not loop.scheduler.counters.num_preemptions:
        loop.turn()
    assert loop.scheduler.running == [old]
    assert loop.scheduler.waiting == [young]
    run(loop)
    assert [old.output, young.output] == wanted


def test_a_short_prompt_does_not_wait_for_a_long_one_before_it() -> None:
    scheduler = Scheduler(make_limits(tokens=16))
    long, short = sequence(100), sequence(6, start=1)
    scheduler.add(long)
    scheduler.schedule()
    scheduler.add(short)
    assert short in scheduler.schedule().sampled


def test_a_long_prompt_gets_on_under_a_stream_of_short_ones() -> None:
    limits = make_limits(tokens=16, slots=8, sequences=8, rows=8, blocks=40)
    loop = StepLoop(FakeModel(limits))
    long = sequence(100, limits=limits, max_tokens=1)
    loop.scheduler.add(long)
    for number in range(40):
        loop.scheduler.add(sequence(16, limits=limits, start=number + 1, max_tokens=1))
        loop.turn()
        if long.finish_reason:
            break
    assert number < 20


def test_a_lower_priority_value_runs_first() -> None:
    scheduler = Scheduler(make_limits(tokens=4, slots=1))
    late, early = sequence(4), sequence(4, start=1)
    late.priority, early.priority = 2, 1
    scheduler.add(late)
    scheduler.add(early)
    scheduler.schedule()
    assert scheduler.running == [early]


def test_a_higher_priority_takes_the_place_of_a_lower_one_and_gives_it_back() -> None:
    loop = StepLoop(FakeModel(make_limits(slots=1)))
    low, high = sequence(4, max_tokens=9), sequence(4, start=1, max_tokens=9)
    high.priority = -1
    wanted = [expected_output(each) for each in (low, high)]
    loop.scheduler.add(low)
    for _ in range(3):
        loop.turn()
    loop.scheduler.add(high)
    loop.turn()
    loop.turn()
    assert loop.scheduler.running == [high]
    run(loop)
    assert [low.output, high.output] == wanted


def test_a_penalised_sequence_misses_no_step() -> None:
    model = FakeModel()
    loop = StepLoop(model)
    loop.scheduler.add(sequence(4, max_tokens=9, presence_penalty=1))
    loop.scheduler.add(sequence(4, max_tokens=9, start=1))
    run(loop)
    assert len(model.steps) == 9


def test_nothing_is_scheduled_beyond_the_last_token() -> None:
    model = FakeModel()
    loop = StepLoop(model)
    loop.scheduler.add(sequence(4, max_tokens=3))
    run(loop)
    assert [step.positions.tolist() for step in model.steps] == [[0, 1, 2, 3], [4], [5]]


def test_the_next_step_is_posted_before_its_token_is_seen() -> None:
    model = FakeModel()
    loop = StepLoop(model)
    loop.scheduler.add(sequence(4, max_tokens=3))
    run(loop)
    assert model.steps[1].tokens.tolist() == [-1]


def test_a_sequence_that_ended_leaves_one_row_that_is_dropped() -> None:
    model = FakeModel()
    free = sequence(4, max_tokens=9)
    third = expected_output(free)[2]
    stopped = sequence(4, max_tokens=9, eos_ids=(third,))
    loop = StepLoop(model)
    loop.scheduler.add(stopped)
    run(loop)
    assert stopped.output == expected_output(free)[:3]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", None)
    assert len(model.steps) == 4
    assert loop.scheduler.pool.num_free == model.limits.blocks


def test_a_stop_token_is_named_and_ignore_eos_goes_on() -> None:
    third = expected_output(sequence(4, max_tokens=9))[2]
    loop = StepLoop(FakeModel())
    stopped = sequence(4, max_tokens=9, stop_token_ids=[third])
    ignoring = sequence(4, max_tokens=9, eos_ids=(third,), ignore_eos=True)
    loop.scheduler.add(stopped)
    loop.scheduler.add(ignoring)
    run(loop)
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", third)
    assert (ignoring.finish_reason, len(ignoring.output)) == ("length", 9)


def test_the_context_ends_a_sequence() -> None:
    loop = StepLoop(FakeModel())
    limited = sequence(4, max_tokens=None, max_model_len=10)
    loop.scheduler.add(limited)
    run(loop)
    assert (len(limited.tokens), limited.finish_reason) == (10, "length")


def test_penalties_see_every_token_before() -> None:
    loop = StepLoop(FakeModel())
    penalised = [sequence(5, start=i, frequency_penalty=0.5, max_tokens=6) for i in range(2)]
    plain = sequence(5, start=9, max_tokens=12)
    wanted = [expected_output(each) for each in (*penalised, plain)]
    for each in (*penalised, plain):
        loop.scheduler.add(each)
    run(loop)
    assert [each.output for each in (*penalised, plain)] == wanted


@pytest.mark.parametrize(
    ("max_model_len", "longest", "message"),
    [
        (64, 100, "leaves room for 63: shorten the prompt or raise max_model_len, up to 100$"),
        (64, 64, "leaves room for 63: shorten the prompt: the model was made for no more$"),
        (256, 256, "leaves room for 127: shorten the prompt or raise kv_cache_memory_bytes$"),
    ],
)
def test_a_prompt_that_is_too_long_is_told_what_helps(
    max_model_len: int, longest: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_sequence(
            "the prompt",
            [1] * 200,
            SamplingParams(),
            seed=0,
            eos_ids=(),
            limits=make_limits(blocks_per_sequence=8),
            max_model_len=max_model_len,
            longest_model_len=longest,
        )


def test_a_prompt_that_can_never_fit_is_refused() -> None:
    sequence(128 - 1)
    with pytest.raises(UsageError, match="the prompt has 128 tokens, but a context of 128"):
        sequence(128)
    with pytest.raises(UsageError, match="context of 10 leaves room for 9"):
        sequence(10, max_model_len=10)
    with pytest.raises(CapacityError, match="KV cache of 32 leaves room for 31"):
        sequence(32, limits=make_limits(blocks=2))


@pytest.mark.parametrize("prompt", [[], [-1], [1000], ["a"], [1.0], [True]])
def test_a_prompt_of_anything_but_token_ids_is_refused(prompt: list[object]) -> None:
    with pytest.raises(UsageError, match=r"^the prompt "):
        make_sequence(
            "the prompt",
            prompt,
            SamplingParams(),
            seed=0,
            eos_ids=(),
            limits=make_limits(),
            max_model_len=99,
        )


@dataclass
class Arrival:
    """A request of the property test: when it comes, and when its caller leaves."""

    turn: int
    prompt_len: int
    max_tokens: int | None
    is_penalised: bool
    num_eos: int
    leaves: int | None
    sequence: Sequence | None = field(default=None, repr=False)


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        turn=st.integers(0, 30),
        prompt_len=st.integers(1, 60),
        max_tokens=st.one_of(st.none(), st.integers(1, 50)),
        is_penalised=st.booleans(),
        num_eos=st.sampled_from([0, 0, 20, 60]),
        leaves=st.one_of(st.none(), st.none(), st.integers(0, 60)),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(
    arrivals=ARRIVALS,
    tokens=st.integers(1, 40),
    slots=st.integers(1, 5),
    blocks=st.integers(4, 12),
)
def test_every_sequence_says_the_same_whatever_the_company(
    arrivals: list[Arrival], tokens: int, slots: int, blocks: int
) -> None:
    limits = make_limits(
        tokens=tokens, slots=slots, sequences=slots, rows=slots, blocks=blocks, vocab_size=1000
    )
    model = FakeModel(limits)
    loop = StepLoop(model)
    wanted, arrived = [], []
    for index, arrival in enumerate(arrivals):
        arrival.sequence = sequence(
            arrival.prompt_len,
            limits=limits,
            eos_ids=tuple(range(arrival.num_eos)),
            start=100 * index,
            max_tokens=arrival.max_tokens,
            repetition_penalty=1.5 if arrival.is_penalised else 1,
        )
        wanted.append(expected_output(arrival.sequence))
    turn = 0
    while loop.has_work or any(arrival.turn >= turn for arrival in arrivals):
        for arrival in arrivals:
            if arrival.turn == turn:
                loop.scheduler.add(arrival.sequence)
                arrived.append(arrival.sequence)
            left = arrival.leaves is not None and turn == arrival.turn + arrival.leaves
            if left and arrival.sequence.finish_reason is None:
                loop.scheduler.finish(arrival.sequence, "abort")
                loop.scheduler.check()
        loop.turn()
        loop.scheduler.check()
        unfinished = {*loop.scheduler.running, *loop.scheduler.waiting}
        assert unfinished == {each for each in arrived if each.finish_reason is None}
        turn += 1
        assert turn < 3000, "it does not end"
    loop.scheduler.pool.check([])
    for arrival, output in zip(arrivals, wanted, strict=True):
        got = arrival.sequence.output
        assert arrival.sequence.finish_reason is not None
        assert got == output[: len(got)]
        assert len(got) == len(output) or arrival.sequence.finish_reason == "abort"

"""Guessing ahead: what is guessed, and when it is left alone. That it changes nothing that is
said is shown by the random schedules."""

import pytest
from fake_model import FakeModel, expected_output, make_limits

from tokenmill.engine.draft_model import DraftModel
from tokenmill.engine.sequence import Sequence, make_sequence
from tokenmill.engine.speculation import Drafter, NgramDrafter, Speculator
from tokenmill.engine.step_loop import StepLoop
from tokenmill.errors import UsageError
from tokenmill.sampling.ngrams import NgramIndex
from tokenmill.sampling.pace import Pace
from tokenmill.sampling.params import SamplingParams

LIMITS = make_limits(tokens=64, blocks=40, rows=12, slots=12, sequences=12)


@pytest.mark.parametrize(
    ("text", "count", "guess"),
    [
        ("abcdXabcd", 3, "Xab"),
        ("abXcbaYb", 2, ""),
        ("xyAzyBxy", 1, "A"),
        ("1abc2abc3abc", 2, "3a"),
        ("abab", 5, "ababa"),
        ("aaaa", 3, "aaa"),
        ("a", 3, ""),
        ("", 3, ""),
    ],
)
def test_a_text_is_thought_to_go_on_as_it_did_before(text: str, count: int, guess: str) -> None:
    index = NgramIndex()
    assert "".join(map(chr, index.guess([ord(c) for c in text], count))) == guess


def test_an_index_grows_with_its_text() -> None:
    text = [1, 2, 3, 9, 1, 2, 3, 7, 1, 2, 3]
    growing = NgramIndex()
    for end in range(1, len(text) + 1):
        assert growing.guess(text[:end], 2) == NgramIndex().guess(text[:end], 2)


def test_bad_guesses_end_guessing_for_longer_and_longer() -> None:
    pace, pauses, num_tokens = Pace(), [], 0
    for _ in range(4):
        while pace.is_on(num_tokens):
            pace.note(0, num_tokens, 0.35)
            num_tokens += 1
        begin = num_tokens
        while not pace.is_on(num_tokens):
            num_tokens += 1
        pauses.append(num_tokens - begin)
    assert pauses == sorted(set(pauses))


def test_good_guesses_become_longer() -> None:
    pace = Pace()
    first = pace.num_drafts
    for num_tokens in range(20):
        pace.note(pace.num_drafts, num_tokens, 0.35)
        assert pace.is_on(num_tokens)
    assert pace.num_drafts > 2 * first


def test_a_dear_drafter_must_be_right_more_often() -> None:
    cheap, dear = Pace(), Pace()
    for num_tokens in range(30):
        cheap.note(1, num_tokens, 0.35)
        dear.note(1, num_tokens, 1.5)
    assert cheap.is_on(30)
    assert not dear.is_on(30)


def make(number: int = 0, **params: object) -> Sequence:
    return make_sequence(
        "the prompt",
        [number, 1, 2],
        SamplingParams(**{"temperature": 0, "max_tokens": 40, **params}),
        seed=number,
        eos_ids=(),
        limits=LIMITS,
        max_model_len=10_000,
    )


def make_loop(drafter: Drafter) -> tuple[StepLoop, FakeModel]:
    model = FakeModel(LIMITS)
    return StepLoop(model, speculator=Speculator(drafter, 4, clock=lambda: 0.0)), model


def run(loop: StepLoop, sequences: list[Sequence]) -> None:
    wanted = [expected_output(sequence) for sequence in sequences]
    for sequence in sequences:
        loop.scheduler.add(sequence)
    while loop.has_work:
        loop.turn()
        loop.scheduler.check()
    assert [sequence.output for sequence in sequences] == wanted


@pytest.mark.parametrize("params", [{}, {"temperature": 1}, {"temperature": 1, "logprobs": 2}])
def test_a_draft_model_that_thinks_alike_saves_most_steps(params: dict[str, object]) -> None:
    loop, model = make_loop(DraftModel(FakeModel(LIMITS), LIMITS))
    run(loop, [make(**params)])
    assert len(model.steps) < 40 / 3
    counters = loop.scheduler.counters
    assert counters.accepted_tokens >= 0.9 * counters.draft_tokens > 20


def test_guesses_stop_in_a_large_batch() -> None:
    loop, model = make_loop(DraftModel(FakeModel(LIMITS), LIMITS))
    run(loop, [make(number, max_tokens=10) for number in range(9)])
    assert loop.scheduler.counters.draft_tokens == 0
    assert max(len(step.rows) for step in model.steps) <= 9


def test_a_penalised_sequence_is_not_guessed() -> None:
    loop, _ = make_loop(DraftModel(FakeModel(LIMITS), LIMITS))
    run(loop, [make(presence_penalty=1)])
    assert loop.scheduler.counters.draft_tokens == 0


def test_a_text_without_repetitions_costs_nothing_after_a_while() -> None:
    loop, model = make_loop(NgramDrafter())
    run(loop, [make(max_tokens=100)])
    waiting = sum(step.tokens.min() >= 0 for step in model.steps)
    assert waiting < len(model.steps) / 2


def test_a_draft_model_forgets_who_has_gone() -> None:
    drafter = DraftModel(FakeModel(LIMITS), LIMITS)
    loop, _ = make_loop(drafter)
    run(loop, [make(number) for number in range(3)])
    drafter.keep_only([])
    drafter.check()
    assert drafter._pool.num_free == LIMITS.blocks


def test_a_draft_model_must_have_the_same_tokens() -> None:
    with pytest.raises(UsageError, match="500 tokens and the model 1000"):
        DraftModel(FakeModel(make_limits(vocab_size=500)), LIMITS)

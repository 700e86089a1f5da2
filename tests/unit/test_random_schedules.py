"""Thousands of random schedules through the real scheduler, pool and step builder.

Requests come and go, share beginnings, fork, are preempted and are put first, in pools that are
far too small. Whatever happens, each sequence says exactly what it says alone.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from fake_model import (
    FakeModel,
    expected_embedding,
    expected_output,
    make_adapter,
    make_limits,
    mark_of,
    seen_of,
    token_logprobs,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.backends.base import StepInput, StepLimits, window_blocks_for
from tokenmill.engine.draft_model import DraftModel
from tokenmill.engine.outputs import Logprob
from tokenmill.engine.pooling import shaped
from tokenmill.engine.sequence import Sequence, make_pooled_sequence, make_sequence
from tokenmill.engine.speculation import Drafter, NgramDrafter, Speculator
from tokenmill.engine.step_loop import StepLoop
from tokenmill.sampling.params import SamplingParams
from tokenmill.sampling.pooling import PoolingParams

VOCAB = 16
ADAPTERS = {name: make_adapter(name) for name in "abc"}
EOS = (3, 4)


@dataclass
class Arrival:
    """A request: when it comes, when its caller leaves, what it asks for."""

    turn: int
    family: int  # prompts of a family begin alike
    prompt_len: int
    n: int
    priority: int
    salt: str
    adapter: str | None
    leaves: int | None
    params: dict[str, object]
    bad_words: list[list[int]]
    pooling: str | None
    sequences: list[Sequence] = field(default_factory=list)

    def prompt(self) -> list[int]:
        shared = [(self.family * 7 + i * i) % VOCAB for i in range(self.prompt_len)]
        return shared if self.family % 2 else [*shared[:-1], self.prompt_len % VOCAB]

    def start(self, number: int, limits: StepLimits) -> list[Sequence]:
        if self.pooling is not None:
            sequence = make_pooled_sequence(
                "the prompt",
                self.prompt(),
                PoolingParams(pooling=self.pooling),
                limits=limits,
                max_model_len=10_000,
                priority=self.priority,
            )
            self.sequences.append(sequence)
            return self.sequences
        for index in range(self.n):
            sequence = make_sequence(
                "the prompt",
                self.prompt(),
                SamplingParams(**self.params),
                seed=1000 * number + index,
                eos_ids=EOS,
                limits=limits,
                max_model_len=10_000,
                bad_words=self.bad_words,
                priority=self.priority,
                cache_salt=self.salt,
                adapter=ADAPTERS[self.adapter] if self.adapter else None,
                parent=self.sequences[0] if self.sequences else None,
            )
            self.sequences.append(sequence)
        return self.sequences


PARAMS = st.fixed_dictionaries(
    {"max_tokens": st.sampled_from([1, 5, 20, 40, None, None])},
    optional={
        "temperature": st.sampled_from([0, 0.7]),
        "repetition_penalty": st.sampled_from([1, 1, 1.5]),
        "ignore_eos": st.sampled_from([True, True, False]),
        "logprobs": st.integers(0, 3),
        "prompt_logprobs": st.sampled_from([0, 2]),
        "min_tokens": st.sampled_from([1]),
        "logit_bias": st.just({7: 2.5}),
        "allowed_token_ids": st.just([3, 5, 7, 11]),
    },
)


POOLINGS = ("last", "mean", "cls")
SOME_POOLINGS = st.sampled_from([None, None, None, *POOLINGS])


def arrivals(
    *,
    most: int,
    prompt_len: st.SearchStrategy[int],
    poolings: st.SearchStrategy[str | None] = SOME_POOLINGS,
) -> st.SearchStrategy[list[Arrival]]:
    """Up to so many requests."""
    arrival = st.builds(
        Arrival,
        turn=st.integers(0, 12),
        family=st.integers(0, 3),
        prompt_len=prompt_len,
        n=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        salt=st.sampled_from(["", "", "tenant"]),
        adapter=st.sampled_from([None, None, None, *ADAPTERS]),
        leaves=st.one_of(st.none(), st.none(), st.integers(0, 60)),
        params=PARAMS,
        bad_words=st.sampled_from([[], [], [[5]], [[5, 7], [9, 2, 1]]]),
        pooling=poolings,
    )
    return st.lists(arrival, min_size=1, max_size=most)


class ErringModel(FakeModel):
    """Says every third time something else than the model that it guesses for."""

    def _sample(self, step: StepInput, row: int) -> int:
        token = super()._sample(step, row)
        return token if len(self._seen(step, row)) % 3 else (token + 1) % VOCAB


DRAFTERS = st.one_of(
    st.none(),
    st.just("ngram"),
    st.just("ngram"),
    st.fixed_dictionaries(
        {
            "tokens": st.integers(1, 30),
            "slots": st.integers(1, 4),
            "blocks": st.integers(1, 12),
            "blocks_per_sequence": st.integers(2, 8),
        }
    ),
)


def make_drafter(kind: str | dict[str, int], target: StepLimits, errs: bool) -> Drafter:
    if kind == "ngram":
        return NgramDrafter()
    limits = make_limits(vocab_size=VOCAB, **kind)
    return DraftModel(ErringModel(limits) if errs else FakeModel(limits), target)


def run(
    loop: StepLoop, arrivals: list[Arrival], limits: StepLimits, drafter: Drafter | None
) -> None:
    """Let everybody come and go; check the books after every step."""
    for turn in range(5000):
        for number, arrival in enumerate(arrivals):
            if arrival.turn == turn:
                for sequence in arrival.start(number, limits):
                    loop.scheduler.add(sequence)
            if arrival.leaves is not None and turn == arrival.turn + arrival.leaves:
                for sequence in arrival.sequences:
                    if sequence.finish_reason is None:
                        loop.scheduler.finish(sequence, "abort")
                loop.scheduler.check()
        loop.turn()
        loop.scheduler.check()
        if isinstance(drafter, DraftModel):
            drafter.check()
        if not loop.has_work and all(arrival.turn <= turn for arrival in arrivals):
            return
    pytest.fail("it does not end")


OPTIONS = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 40),
        "slots": st.integers(1, 5),
        "num_more_rows": st.integers(0, 6),
        "has_prefix_cache": st.sampled_from([True, True, False]),
        "drafts": DRAFTERS,
        "draft_errs": st.booleans(),
        "num_drafts": st.integers(1, 7),
        "window": st.sampled_from([0, 0, 1, 2, 16, 17, 40, 200]),
        "adapter_slots": st.integers(1, 3),
    }
)


@settings(max_examples=1200, deadline=None)
@given(
    few=arrivals(most=3, prompt_len=st.one_of(st.integers(1, 34), st.sampled_from([16, 32]))),
    blocks=st.integers(3, 6),
    options=OPTIONS,
)
def test_in_short_contexts_every_sequence_says_what_it_says_alone(
    few: list[Arrival], blocks: int, options: dict[str, Any]
) -> None:
    check_schedule(few, blocks=blocks, blocks_per_sequence=3, **options)


@settings(max_examples=120, deadline=None)
@given(
    many=arrivals(most=8, prompt_len=st.one_of(st.integers(1, 70), st.sampled_from([16, 32, 48]))),
    blocks=st.integers(5, 16),
    options=OPTIONS,
)
def test_every_sequence_says_what_it_says_alone(
    many: list[Arrival], blocks: int, options: dict[str, Any]
) -> None:
    check_schedule(many, blocks=blocks, blocks_per_sequence=8, **options)


def check_schedule(
    arrivals: list[Arrival],
    *,
    tokens: int,
    slots: int,
    num_more_rows: int,
    blocks: int,
    blocks_per_sequence: int,
    has_prefix_cache: bool,
    drafts: str | dict[str, int] | None,
    draft_errs: bool,
    num_drafts: int,
    window: int,
    adapter_slots: int,
) -> None:
    limits = make_limits(
        tokens=tokens,
        slots=slots,
        sequences=slots,
        rows=slots + num_more_rows,
        blocks=blocks,
        blocks_per_sequence=blocks_per_sequence,
        vocab_size=VOCAB,
        logprobs=5,
        window=window,
        window_blocks=window and window_blocks_for(window, num_sequences=slots, step_tokens=tokens),
        adapter_slots=adapter_slots,
    )
    drafter = None if drafts is None else make_drafter(drafts, limits, draft_errs)
    # A clock that stands still: whether guessing pays is then a matter of right and wrong alone.
    speculator = drafter and Speculator(drafter, num_drafts, clock=lambda: 0.0)
    loop = StepLoop(FakeModel(limits), has_prefix_cache=has_prefix_cache, speculator=speculator)
    run(loop, arrivals, limits, drafter)
    loop.scheduler.pool.check([])
    if loop.scheduler.windows is not None:
        loop.scheduler.windows.check([])
    for arrival in arrivals:
        for sequence in arrival.sequences:
            check_output(sequence)


@settings(max_examples=200, deadline=None)
@given(
    many=arrivals(most=8, prompt_len=st.integers(1, 40), poolings=st.sampled_from(POOLINGS)),
    tokens=st.integers(40, 70),
    slots=st.integers(1, 5),
    blocks=st.integers(3, 12),
)
def test_an_encoder_reads_every_sequence_in_one_piece(
    many: list[Arrival], tokens: int, slots: int, blocks: int
) -> None:
    """What it sees of a token depends on all others, so one that is cut or reused would differ."""
    limits = make_limits(
        tokens=tokens,
        slots=slots,
        sequences=slots,
        rows=slots,
        blocks=blocks,
        blocks_per_sequence=3,
        vocab_size=VOCAB,
        is_encoder=True,
    )
    loop = StepLoop(FakeModel(limits))
    run(loop, many, limits, None)
    loop.scheduler.pool.check([])
    for arrival in many:
        for sequence in arrival.sequences:
            check_embedding(sequence, is_encoder=True)


def check_embedding(sequence: Sequence, *, is_encoder: bool = False) -> None:
    if sequence.finish_reason == "abort":
        return
    assert (sequence.finish_reason, sequence.output) == ("stop", [])
    assert sequence.pooled is not None
    assert sequence.pool is not None
    found = shaped(sequence.pooled, sequence.pool.params)
    wanted = expected_embedding(sequence, is_encoder=is_encoder)
    assert np.allclose(found, wanted, rtol=1e-6, atol=0)


def check_output(sequence: Sequence) -> None:
    """All of what it says alone, or the beginning if its caller left."""
    if sequence.pool is not None:
        return check_embedding(sequence)
    output = list(sequence.output)
    del sequence.tokens[sequence.prompt_len :]
    wanted = expected_output(sequence, VOCAB)
    assert output == wanted[: len(output)]
    assert len(output) == len(wanted) or sequence.finish_reason == "abort"
    check_logprobs(sequence, output)


def check_logprobs(sequence: Sequence, output: list[int]) -> None:
    params, tokens = sequence.params, [*sequence.tokens, *output]
    mark = 0 if sequence.adapter is None else mark_of(sequence.adapter.changes)
    if params.logprobs is None:
        assert not sequence.logprobs
    else:
        assert sequence.logprobs == [
            expected_logprobs(tokens, sequence.prompt_len + index, params.logprobs, mark)
            for index in range(len(output))
        ]
    if output and params.prompt_logprobs is not None and sequence.parent is None:
        assert sequence.prompt_logprobs == [
            None,
            *(
                expected_logprobs(tokens, index, params.prompt_logprobs, mark)
                for index in range(1, sequence.prompt_len)
            ),
        ]


def expected_logprobs(tokens: list[int], index: int, num_top: int, mark: int) -> dict[int, Logprob]:
    seen = seen_of(tokens[:index], mark)
    logprob, rank, top_ids, top = token_logprobs(seen, tokens[index], num_top)
    found = {tokens[index]: Logprob(np.float32(logprob).item(), rank)}
    for place, (token, value) in enumerate(zip(top_ids, top, strict=True), start=1):
        found.setdefault(token, Logprob(np.float32(value).item(), place))
    return found

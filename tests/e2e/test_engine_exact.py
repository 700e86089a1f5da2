"""What a request says does not depend on how the engine got there: not one token, not one bit.

The same requests, all at once, through engines that share beginnings, guess ahead and run out of
blocks; each must say what it says alone in an engine that does none of that.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import pytest

from tokenmill import LLM, SamplingParams
from tokenmill.engine.outputs import OutputDelta, RequestOutput
from tokenmill.engine.request import Delivery, Request
from tokenmill.engine.speculation import Speculator
from tokenmill.engine.stats import EngineStats

SYSTEM = "You answer in one short sentence. " * 6
CODE = "def area(width, height):\n    return width * height\n\n" * 4

REQUESTS = [
    ("The capital of France is", SamplingParams(temperature=0, max_tokens=40)),
    (SYSTEM + "What is rain?", SamplingParams(temperature=0.8, seed=1, max_tokens=30)),
    (SYSTEM + "What is snow?", SamplingParams(temperature=1, top_k=40, seed=2, max_tokens=30)),
    (SYSTEM + "What is hail?", SamplingParams(temperature=0, n=2, max_tokens=20, logprobs=3)),
    (SYSTEM, SamplingParams(temperature=1.2, top_p=0.9, seed=3, n=3, max_tokens=25)),
    (CODE, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)),
    (CODE, SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=2, logprobs=1)),
    (CODE * 4, SamplingParams(temperature=0.3, seed=4, max_tokens=50, min_p=0.05)),
    ("One, two,", SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=30)),
    ("One, two,", SamplingParams(seed=5, max_tokens=30, bad_words=["three"], min_tokens=20)),
    ("A B A B A B", SamplingParams(temperature=0, max_tokens=50, logit_bias={33: 1.5})),
    ("Yes or no?", SamplingParams(seed=6, max_tokens=9, allowed_token_ids=list(range(200)))),
    # Of two tokens alone a text soon repeats itself, which is easy to guess.
    (
        "On and on and on",
        SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, allowed_token_ids=[260, 282]),
    ),
    *(
        (f"Chapter {number}", SamplingParams(seed=number, max_tokens=80, ignore_eos=True))
        for number in range(6)
    ),
]


@pytest.fixture(scope="module")
def alone(smollm2: Path, caches: Path) -> list[RequestOutput]:
    """Each request by itself."""
    with engine(smollm2, enable_prefix_caching=False) as llm:
        outputs = [llm.generate(prompt, params)[0] for prompt, params in REQUESTS]
        assert llm.engine.stats().num_preemptions == 0
    return outputs


@contextmanager
def engine(model: Path, **options: object) -> Iterator[LLM]:
    options = {"max_model_len": 512, "max_num_batched_tokens": 96, "max_num_seqs": 20, **options}
    with LLM(str(model), **options) as llm:
        yield llm


def answers(outputs: list[RequestOutput]) -> list[object]:
    """All that must be the same."""
    return [(output.outputs, output.prompt_logprobs) for output in outputs]


@pytest.mark.parametrize(
    ("options", "happened"),
    [
        ({}, lambda stats: stats.prefix_cache_hits > 100),
        ({"enable_prefix_caching": False}, lambda stats: stats.prefix_cache_hits == 0),
        # In larger batches rows cost time, and nobody guesses.
        ({"speculative": "ngram", "max_num_seqs": 4}, lambda stats: stats.accepted_tokens > 10),
        # A draft model as large as the model cannot pay, and is soon switched off.
        ({"speculative": "itself", "max_num_seqs": 4}, lambda stats: stats.accepted_tokens > 0),
        ({"kv_cache_memory_bytes": 8_000_000}, lambda stats: stats.num_preemptions > 0),
        (
            {"kv_cache_memory_bytes": 8_000_000, "speculative": "ngram", "max_num_seqs": 3},
            lambda stats: stats.accepted_tokens > 0,
        ),
        ({"max_num_batched_tokens": 7, "max_num_seqs": 7}, lambda stats: stats.num_steps > 100),
    ],
)
def test_a_request_says_what_it_says_alone(
    smollm2: Path,
    alone: list[RequestOutput],
    options: dict[str, object],
    happened: Callable[[EngineStats], bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Whether guessing pays is measured, and depends on how busy the machine is.
    monkeypatch.setattr(Speculator, "_cost", 0.4)
    if options.get("speculative") == "itself":
        options = {**options, "speculative": str(smollm2)}
    prompts, params = zip(*REQUESTS, strict=True)
    with engine(smollm2, **options) as llm:
        for _ in range(2):  # the second time, what the first left in the cache is there
            outputs = llm.generate(list(prompts), list(params))
            assert answers(outputs) == answers(alone)
        stats = llm.engine.stats()
    assert happened(stats), stats
    assert stats.num_used_blocks == 0


@pytest.mark.parametrize("seed", range(3))
def test_comings_and_goings_change_nothing(
    smollm2: Path, alone: list[RequestOutput], seed: int
) -> None:
    """Requests come at random steps with random priorities, among others whose callers leave."""
    rng = random.Random(seed)
    options = {
        "kv_cache_memory_bytes": rng.choice([8_000_000, 12_000_000]),
        "max_num_seqs": rng.choice([3, 6, 20]),
        "max_num_batched_tokens": rng.choice([24, 64, 96]),
        "speculative": rng.choice(["off", "ngram"]),
    }
    events: SimpleQueue[list[Delivery]] = SimpleQueue()
    kept: dict[Request, int] = {}
    outputs: dict[Request, RequestOutput] = {}
    with engine(smollm2, **options) as llm:
        plan = [(index, leaves) for index in range(len(REQUESTS)) for leaves in (False, True)]
        rng.shuffle(plan)
        for index, leaves in plan:
            request = llm.make_request(
                *REQUESTS[index],
                sink=events.put,
                priority=rng.choice([-1, 0, 0, 1]),
                cache_salt=rng.choice(["", "", "tenant"]),
            )
            kept[request] = index
            llm.engine.submit([request])
            wait_for_steps(llm, rng.randrange(12))
            if leaves:
                llm.engine.abort([request])
        while len(outputs) < len(plan):
            for request, event in events.get(timeout=120):
                assert isinstance(event, OutputDelta)
                assert event.output is not None
                outputs[request] = event.output
        assert llm.engine.stats().num_used_blocks == 0
    for request, index in kept.items():
        for got, wanted in zip(outputs[request].outputs, alone[index].outputs, strict=True):
            if got.finish_reason == "abort":
                assert got.token_ids == wanted.token_ids[: len(got.token_ids)]
            else:
                assert got == wanted


def wait_for_steps(llm: LLM, count: int) -> None:
    """Until the engine has done so many steps more, or has nothing left to do."""
    last = llm.engine.stats().num_steps + count
    while llm.engine.stats().num_steps < last and llm.engine.heartbeat().has_work:
        time.sleep(0.001)

"""What a sequence says depends on nothing but its own tokens: not one bit of its logits.

Random schedules attack it: other sequences in the same step, prompts cut anywhere, blocks from all
over the pool, one to three threads, steps of other largest sizes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backend.traffic import (
    Chunk,
    Traffic,
    random_steps,
    run_traffic,
    shuffled_tables,
    soil_cache,
)
from tokenmill import LLM, SamplingParams
from tokenmill.backends.base import CompiledModel, F32Array
from tokenmill.config import ACTIVATIONS, EngineConfig
from tokenmill.models.loader import load_model

STEP_TOKENS = 96
LENGTHS = (300, 45, 17, 1)
"""One crosses a border of attention's split of positions; one fills no block, one no tile."""


@pytest.fixture(params=["smollm2", "small_qwen", "qwen"])
def model_path(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@contextmanager
def compiled_model(path: Path, activations: str, threads: int) -> Iterator[CompiledModel]:
    """A model that gives the logits of every token of a step."""
    config = EngineConfig(
        model=str(path),
        activations=activations,
        threads=threads,
        max_model_len=512,
        max_num_seqs=STEP_TOKENS,
        max_num_batched_tokens=STEP_TOKENS,
        kv_cache_memory_bytes=2**28,
    )
    compiled = load_model(config).compiled
    try:
        yield compiled
    finally:
        compiled.close()


def whole_steps(lengths: Sequence[int]) -> tuple[tuple[Chunk, ...], ...]:
    """Each sequence by itself, in the largest chunks."""
    return tuple(
        (Chunk(sequence=index, start=start, length=min(STEP_TOKENS, length - start)),)
        for index, length in enumerate(lengths)
        for start in range(0, length, STEP_TOKENS)
    )


def assert_same_bits(found: list[F32Array], expected: list[F32Array], what: str) -> None:
    for index, (mine, other) in enumerate(zip(found, expected, strict=True)):
        differ = (mine.view(np.uint32) != other.view(np.uint32)).any(axis=1)
        assert not differ.any(), f"{what}: sequence {index}, positions {np.flatnonzero(differ)}"


@pytest.mark.slow
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_logits_do_not_depend_on_the_schedule(model_path, caches, activations):
    rng = np.random.default_rng(20)
    with compiled_model(model_path, activations, 1) as model:
        limits = model.limits
        traffic = Traffic(
            sequences=tuple(rng.integers(0, limits.vocab_size, n, np.int32) for n in LENGTHS),
            tables=shuffled_tables(rng, limits, LENGTHS),
            steps=whole_steps(LENGTHS),
        )
        expected = run_traffic(model, traffic)
    for threads in (1, 2, 3):
        with compiled_model(model_path, activations, threads) as model:
            for _ in range(2):
                attacked = replace(
                    traffic,
                    tables=shuffled_tables(rng, limits, LENGTHS),
                    steps=random_steps(rng, LENGTHS, STEP_TOKENS),
                )
                what = f"{threads} threads, {len(attacked.steps)} steps"
                assert_same_bits(run_traffic(model, attacked), expected, what)


@pytest.mark.slow
def test_logits_do_not_depend_on_what_the_cache_held_before(smollm2, caches):
    rng = np.random.default_rng(21)
    with compiled_model(smollm2, "bf16", 2) as model:
        traffic = Traffic(
            sequences=(rng.integers(0, model.limits.vocab_size, 70, np.int32),),
            tables=shuffled_tables(rng, model.limits, [70]),
            steps=random_steps(rng, [70], STEP_TOKENS),
        )
        fresh = run_traffic(model, traffic)
        soil_cache(model, rng)
        assert_same_bits(run_traffic(model, traffic), fresh, "a used pool")


# -- the same through the engine


CONTEXT = 1024  # the small model's tokenizer makes a token of nearly every letter
TEXT = "The mill turns grain into flour while water runs under its wheel and never stops"
EVERY_KIND = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.9, seed=1),
    SamplingParams(temperature=1.2, seed=2, top_k=40, top_p=0.9),
    SamplingParams(temperature=0.8, seed=3, min_p=0.05, repetition_penalty=1.2),
    SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.5),
)


def random_requests(count: int) -> tuple[list[str], list[SamplingParams]]:
    rng = np.random.default_rng(22)
    prompts = [" ".join(rng.choice(TEXT.split(), rng.integers(1, 150))) for _ in range(count)]
    params = [
        replace(EVERY_KIND[i % len(EVERY_KIND)], max_tokens=int(rng.integers(1, 24)))
        for i in range(count)
    ]
    return prompts, params


def generate(
    path: Path, prompts: list[str], params: list[SamplingParams], **options: Any
) -> list[list[int]]:
    with LLM(str(path), max_model_len=CONTEXT, **options) as llm:
        return [output.token_ids for output in llm.generate(prompts, params)]


@pytest.mark.slow
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_many_prompts_together_say_what_each_says_alone(model_path, caches, activations):
    prompts, params = random_requests(12)
    with LLM(str(model_path), max_model_len=CONTEXT, threads=1, activations=activations) as llm:
        alone = [
            llm.generate(prompt, param)[0].token_ids
            for prompt, param in zip(prompts, params, strict=True)
        ]
    for options in (
        {"threads": 2},
        {"threads": 2, "max_num_batched_tokens": 13},
        {"threads": 3, "max_num_batched_tokens": 64, "max_num_seqs": 5},
        {"threads": 2, "kv_cache_memory_bytes": 2**24},
    ):
        assert generate(model_path, prompts, params, activations=activations, **options) == alone

"""Embeddings from decoders: against transformers, and bitwise whatever the company."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.e2e.random_models import Shape, hugging_face_model
from tests.unit.tiny_tokenizers import write_folder
from tokenmill import LLM, SamplingParams
from tokenmill.sampling.pooling import PoolingParams

SHAPE = Shape(kv_heads=2, group=3, head_dim=20, hidden=72, inner=100, vocab_size=300)
F32 = {"activations": "f32", "quantization": "f32"}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
LENGTHS = (1, 2, 17, 70, 300)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    made = hugging_face_model(request.param, SHAPE)
    made.save_pretrained(folder)
    return write_folder(folder), made


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(0, 260, n).tolist() for n in LENGTHS]


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_states_are_those_of_transformers(
    pooling: str, model: tuple[Path, Any], caches: Path
) -> None:
    folder, theirs = model
    with LLM(str(folder), pooling=pooling, normalize=False, **F32) as llm:
        found = [o.outputs.embedding for o in llm.embed(prompts())]
    for prompt, vector in zip(prompts(), found, strict=True):
        with torch.no_grad():
            states = theirs.model(torch.tensor([prompt])).last_hidden_state[0].numpy()
        wanted = {"last": states[-1], "mean": states.mean(0), "cls": states[0]}[pooling]
        assert np.linalg.norm(vector - wanted) < 2e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("activations", ["bf16", "int8"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_bits_do_not_depend_on_company_chunks_threads_or_cache(
    pooling: str, activations: str, model: tuple[Path, Any], caches: Path
) -> None:
    folder, _ = model
    found = []
    for threads, step, cached in ((1, 512, False), (2, 16, False), (3, 48, True), (2, 37, True)):
        with LLM(
            str(folder),
            pooling=pooling,
            activations=activations,
            threads=threads,
            max_num_batched_tokens=step,
            enable_prefix_caching=cached,
        ) as llm:
            llm.generate(prompts()[3] + [5, 6, 7])  # leaves the beginning of one in the cache
            made = llm.embed(prompts() if threads != 2 else prompts()[::-1])
            found.append(made if threads != 2 else made[::-1])
            assert (made[3].num_cached_tokens > 0) == (
                cached and pooling == "last" and threads == 3
            )
            assert llm.engine.stats().num_used_blocks == 0
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert np.array_equal(a.outputs.embedding, b.outputs.embedding)


def test_text_and_embeddings_come_from_one_engine(model: tuple[Path, Any], caches: Path) -> None:
    """Requests of both kinds share steps, and neither changes by a bit."""
    folder, _ = model
    with LLM(str(folder), max_num_batched_tokens=64) as llm:
        alone = [o.token_ids for o in llm.generate(prompts()[:3], GREEDY)]
        vectors = [o.outputs.embedding for o in llm.embed(prompts())]
        streams = [llm.stream(prompt, GREEDY) for prompt in prompts()[:3]]
        said = [list(next(stream).token_ids) for stream in streams]
        mixed = [o.outputs.embedding for o in llm.embed(prompts())]
        for tokens, stream in zip(said, streams, strict=True):
            for delta in stream:
                tokens += delta.token_ids
    assert said == alone
    assert all(map(np.array_equal, vectors, mixed))


def test_one_request_may_ask_for_another_pooling(model: tuple[Path, Any], caches: Path) -> None:
    folder, _ = model
    with LLM(str(folder)) as llm:
        last, mean = (
            llm.embed(prompts()[2], pooling_params=PoolingParams(pooling=p))[0].outputs.embedding
            for p in ("last", "mean")
        )
        assert np.array_equal(llm.embed(prompts()[2])[0].outputs.embedding, last)
    assert not np.array_equal(last, mean)
    assert np.isclose(np.linalg.norm(mean), 1)

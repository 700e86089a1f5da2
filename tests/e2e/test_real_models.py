"""Real models in float32 throughout say word for word what transformers says.

The reference is transformers on the file's weights, dequantised by the `gguf` package: nothing of
ours stands on that side. That it would have chosen each of our tokens is seen in one pass over
them all.
"""

import os
from pathlib import Path

import pytest

from tokenmill.engine.llm import LLM
from tokenmill.sampling.params import SamplingParams

TINYLLAMA_VARIABLE = "TOKENMILL_TEST_TINYLLAMA"
"""Names a GGUF file of TinyLlama, which comes in no Python package."""

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village,",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics say that",
    "Dear Ms Smith,\n\nthank you for",
)
NUM_TOKENS = 64


def greedy(path: Path, prompts: tuple[str, ...]) -> list[tuple[list[int], list[int]]]:
    """Token ids of each prompt, and those that follow it."""
    with LLM(
        str(path),
        quantization="f32",
        activations="f32",
        kv_cache="f32",
        max_model_len=1024,
        max_num_seqs=len(prompts),
        kv_cache_memory_bytes=2**30,
    ) as llm:
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        outputs = llm.generate(list(prompts), params)
    return [(output.prompt_token_ids, output.token_ids) for output in outputs]


def assert_reference_agrees(path: Path, texts: list[tuple[list[int], list[int]]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    for prompt, output in texts:
        assert len(output) == NUM_TOKENS
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == output


@pytest.mark.slow
def test_gemma_3_says_what_transformers_says(gemma3: Path, caches: Path) -> None:
    """One prompt is longer than the window of 512 positions."""
    long = (Path(__file__).parents[2] / "LICENSE").read_text()[:3500]
    texts = greedy(gemma3, (*PROMPTS, long))
    assert len(texts[-1][0]) > 600
    assert_reference_agrees(gemma3, texts)


@pytest.mark.slow
def test_tinyllama_says_what_transformers_says(caches: Path) -> None:
    """Of a file of 2-bit codebooks, which are dequantised on load."""
    if TINYLLAMA_VARIABLE not in os.environ:
        pytest.skip(f"{TINYLLAMA_VARIABLE} names no TinyLlama file")
    path = Path(os.environ[TINYLLAMA_VARIABLE])
    assert_reference_agrees(path, greedy(path, PROMPTS))

"""Decoders that were saved without a head, as embedding models are, against transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.unit.tiny_tokenizers import write_folder
from tokenmill import LLM, SamplingParams
from tokenmill.errors import UsageError

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "attn_implementation": "eager",
}
CASES = {
    # config's class of transformers: whether the head is tied, so that it need not be there
    "LlamaConfig": False,
    "MistralConfig": False,
    "Qwen2Config": True,
    "Qwen3Config": True,
    "Gemma3TextConfig": True,
}
F32 = {"activations": "f32", "quantization": "f32"}


def random_model(config: Any, auto: Any = transformers.AutoModel) -> Any:
    """Random weights, of a size at which every part matters."""
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
            else:
                is_one = "norm" in name and "Gemma" not in type(config).__name__
                parameter.normal_(float(is_one), 0.4)
    return model


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(3, 260, n).tolist() for n in (1, 2, 17, 70)]


@pytest.mark.parametrize("name", CASES)
def test_states_are_those_of_transformers(name: str, tmp_path: Path, caches: Path) -> None:
    config = getattr(transformers, name)(**SIZES, tie_word_embeddings=CASES[name])
    model = random_model(config)
    model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    with LLM(str(write_folder(tmp_path)), normalize=False, max_num_batched_tokens=32, **F32) as llm:
        found = [o.outputs.embedding for o in llm.embed(prompts())]
        if CASES[name]:
            assert len(llm.generate("hi", SamplingParams(max_tokens=3))[0].token_ids) <= 3
        else:
            with pytest.raises(UsageError, match=r"no head \(lm_head.weight\).*ask for embeddings"):
                llm.generate("hi")
    for prompt, vector in zip(prompts(), found, strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([prompt])).last_hidden_state[0, -1].numpy()
        assert np.linalg.norm(vector - wanted) < 2e-5 * np.linalg.norm(wanted)


def test_a_head_beside_bare_names_is_found(tmp_path: Path, caches: Path) -> None:
    """Some are saved as ...ForCausalLM, without the prefix of the rest."""
    config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=False)
    model = random_model(config, transformers.AutoModelForCausalLM)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(bare, tmp_path / "model.safetensors")
    with LLM(str(write_folder(tmp_path)), **F32) as llm:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        [output] = llm.generate([prompts()[2]], params)
    with torch.no_grad():
        wanted = model.generate(
            torch.tensor([prompts()[2]]), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
    assert output.token_ids == wanted[0, 17:].tolist()


def test_bits_do_not_depend_on_chunks_or_cache(tmp_path: Path, caches: Path) -> None:
    random_model(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    write_folder(tmp_path)
    found = []
    for step, threads in ((512, 1), (16, 2)):
        with LLM(str(tmp_path), max_num_batched_tokens=step, threads=threads) as llm:
            llm.embed([prompts()[3][:40]])
            made = llm.embed(prompts())
            assert made[3].num_cached_tokens == 32
            found.append([o.outputs.embedding for o in made])
    assert all(map(np.array_equal, *found))


def test_a_draft_needs_a_head(tmp_path: Path, caches: Path) -> None:
    random_model(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    write_folder(tmp_path)
    with pytest.raises(UsageError, match="speculative is 'ngram', but the model's files hold no"):
        LLM(str(tmp_path), speculative="ngram")

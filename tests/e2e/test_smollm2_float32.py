"""In float32 throughout, the real model's logits are those of transformers.

The weights are what `gguf.quants` makes of the file, so nothing of ours stands on that side.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backend.traffic import Chunk, Traffic, run_traffic, shuffled_tables
from tokenmill.backends.base import CompiledModel, F32Array
from tokenmill.config import EngineConfig
from tokenmill.models.loader import LoadedModel, load_model

STEP_TOKENS = 128
LENGTHS = (1, 2, 17, 130, 257, 600)
TOLERANCE = 1e-4

HALF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Any:
    """LlamaForCausalLM in float32 with the file's weights."""
    import gguf
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(smollm2)
    tensors = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(
            tuple(int(size) for size in reversed(t.shape))
        )
        for t in reader.tensors
    }

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    config = LlamaConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        max_position_embeddings=field("context_length"),
        rope_theta=field("rope.freq_base"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    state = {
        name: torch.from_numpy(np.array(weight, np.float32))
        for name, weight in hugging_face_weights(tensors, config).items()
    }
    model.load_state_dict(state)
    return model


def hugging_face_weights(tensors: dict[str, F32Array], config: Any) -> dict[str, F32Array]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    named = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "lm_head.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    for layer in range(config.num_hidden_layers):
        for theirs, short in HALF_NAMES.items():
            weight = tensors[f"blk.{layer}.{short}.weight"]
            if short in heads:
                weight = halves_apart(weight, heads[short])
            named[f"model.layers.{layer}.{theirs}.weight"] = weight
    return named


def halves_apart(weight: F32Array, num_heads: int) -> F32Array:
    """GGUF keeps the two dimensions that rope turns together side by side; undo that."""
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def loaded(smollm2: Path, caches: Path) -> Iterator[LoadedModel]:
    model = load_model(
        EngineConfig(
            model=str(smollm2),
            quantization="f32",
            activations="f32",
            kv_cache="f32",
            max_model_len=1024,
            max_num_seqs=STEP_TOKENS,
            max_num_batched_tokens=STEP_TOKENS,
            kv_cache_memory_bytes=2**28,
        )
    )
    yield model
    model.compiled.close()


@pytest.fixture(scope="module")
def text_ids(loaded: LoadedModel) -> list[int]:
    """Natural text, of enough tokens."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    return loaded.tokenizer.encode(text)[: max(LENGTHS)]


def all_logits(model: CompiledModel, ids: list[int]) -> F32Array:
    """[len(ids), vocab_size]"""
    rng = np.random.default_rng(0)
    steps = tuple(
        (Chunk(sequence=0, start=start, length=min(STEP_TOKENS, len(ids) - start)),)
        for start in range(0, len(ids), STEP_TOKENS)
    )
    tables = shuffled_tables(rng, model.limits, [len(ids)])
    [logits] = run_traffic(
        model, Traffic(sequences=(np.array(ids, np.int32),), tables=tables, steps=steps)
    )
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "random ids"])
@pytest.mark.parametrize("length", LENGTHS)
def test_logits_are_those_of_transformers(reference, loaded, text_ids, length, kind):
    import torch

    rng = np.random.default_rng(length)
    ids = text_ids[:length]
    if kind == "random ids":
        ids = rng.integers(0, loaded.config.vocab_size, length).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    found = all_logits(loaded.compiled, ids)
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert errors.max() < TOLERANCE

"""A Qwen2 with random weights, written without torch, with the same bits on every processor."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.unit.tiny_tokenizers import write_folder

VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER = 300, 2, 6, 1, 128, 192, 416

CONFIG: dict[str, object] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """By the names that files give them."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (q, HIDDEN),
        "self_attn.q_proj.bias": (q,),
        "self_attn.k_proj.weight": (kv, HIDDEN),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, HIDDEN),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (HIDDEN, q),
        "mlp.gate_proj.weight": (INNER, HIDDEN),
        "mlp.up_proj.weight": (INNER, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INNER),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    return shapes | {f"model.layers.{i}.{n}": s for i in range(LAYERS) for n, s in layer.items()}


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Evenly spread: the tails of a normal one come from functions that libraries differ in."""
    rng = np.random.default_rng([*name.encode()])
    values = np.sqrt(np.float32(12)) * (rng.random(shape, np.float32) - np.float32(0.5))
    if len(shape) == 2 and "embed" not in name:
        return values * np.float32(1.5) / np.sqrt(np.float32(shape[1]))
    return values / 2 + np.float32("norm" in name)


def write_small_qwen(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: random_tensor(name, shape) for name, shape in tensor_shapes().items()}
    save_file(tensors, folder / "model.safetensors")
    return write_folder(folder)

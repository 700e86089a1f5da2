"""Small models of transformers with random weights."""

from dataclasses import dataclass

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of one model; `group` is query heads for each key head."""

    kv_heads: int
    group: int
    head_dim: int
    hidden: int
    inner: int
    vocab_size: int = 257
    layers: int = 2
    is_tied: bool = True
    theta: float = 10000.0


def hugging_face_model(architecture: str, shape: Shape) -> PreTrainedModel:
    """A transformers model with random weights, of a size at which every part matters."""
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[architecture]
    config = config_class(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.kv_heads * shape.group,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        tie_word_embeddings=shape.is_tied,
    )
    model = model_class(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(float("norm" in name), 0.5)
    return model

"""Granite 3 (IBM 2024): Llama whose embeddings, scores, residuals and logits are scaled."""

from dataclasses import replace

from tokenmill.models.architecture import Architecture, refuse_hf_layer_types
from tokenmill.models.architectures import llama
from tokenmill.models.config import ModelConfig
from tokenmill.models.fields import Fields


def from_hf(fields: Fields, config: ModelConfig) -> ModelConfig:
    refuse_hf_layer_types(fields)
    return replace(
        config,
        embedding_scale=fields.number("embedding_multiplier", most=1e6, default=1.0),
        attention_scale=fields.number("attention_multiplier", most=1e6, default=1.0),
        residual_scale=fields.number("residual_multiplier", most=1e6, default=1.0),
        logits_scale=1 / fields.number("logits_scaling", most=1e6, default=1.0),
    )


def from_gguf(fields: Fields, config: ModelConfig) -> ModelConfig:
    return replace(
        config,
        embedding_scale=fields.number("granite.embedding_scale", most=1e6, default=1.0),
        attention_scale=fields.number(
            "granite.attention.scale", most=1e6, default=config.score_scale
        ),
        residual_scale=fields.number("granite.residual_scale", most=1e6, default=1.0),
        logits_scale=1 / fields.number("granite.logit_scale", most=1e6, default=1.0),
    )


ARCHITECTURE = Architecture(
    name="granite",
    hf_class="GraniteForCausalLM",
    build=llama.build,
    from_hf=from_hf,
    from_gguf=from_gguf,
    gguf_reads=("embedding_scale", "attention.scale", "residual_scale", "logit_scale"),
    is_interleaved=True,
)

"""Gemma 2 (Gemma team 2024): norms before and behind each half layer, GELU, soft caps, and a
sliding window in every other layer.
"""

from collections.abc import Mapping
from dataclasses import replace

from tokenmill.ir.build import FunctionBuilder
from tokenmill.ir.graph import Graph, Value
from tokenmill.models.architecture import Architecture, with_layer_types
from tokenmill.models.architectures import llama
from tokenmill.models.config import LayerKind, ModelConfig
from tokenmill.models.fields import Fields

NORM_NAMES: Mapping[str, tuple[str, str]] = {
    "post_attn_norm": ("post_attention_layernorm.weight", "post_attention_norm.weight"),
    "ffn_norm": ("pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    "post_ffn_norm": ("post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
}
_LARGEST = 46  # layers of the model whose scores are scaled by hidden size; GGUF files do not say


def build(config: ModelConfig) -> Graph:
    return llama.decoder(config, layer)


def layer(
    f: FunctionBuilder,
    kind: LayerKind,
    x: Value,
    place: Value,
    config: ModelConfig,
    head_norm: llama.HeadNorm = llama.no_head_norm,
) -> Value:
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""
    h = llama.norm(f, x, "attn_norm", config)
    h = llama.attention(f, kind, h, place, config, head_norm)
    x = f.add(x, llama.norm(f, h, "post_attn_norm", config))
    h = llama.mlp(f, llama.norm(f, x, "ffn_norm", config), config, FunctionBuilder.gelu)
    return f.add(x, llama.norm(f, h, "post_ffn_norm", config))


def from_hf(fields: Fields, config: ModelConfig) -> ModelConfig:
    fields.require({"use_bidirectional_attention": (False,)})
    window = fields.integer("sliding_window", most=2**30, default=4096)
    return with_hf_scales(
        fields, with_layer_types(fields, config, layer_types(config.num_layers, 2), window)
    )


def with_hf_scales(fields: Fields, config: ModelConfig) -> ModelConfig:
    return replace(
        config,
        embedding_scale=config.hidden_size**0.5,
        attention_scale=fields.number("query_pre_attn_scalar", most=1e6, default=256.0) ** -0.5,
        attention_softcap=_cap(fields, "attn_logit_softcapping"),
        logits_softcap=_cap(fields, "final_logit_softcapping"),
    )


def from_gguf(fields: Fields, config: ModelConfig) -> ModelConfig:
    window = fields.integer("gemma2.attention.sliding_window", most=2**30, default=4096)
    config = with_layer_types(fields, config, layer_types(config.num_layers, 2), window)
    return with_gguf_scales(fields, "gemma2", config, _LARGEST)


def with_gguf_scales(fields: Fields, prefix: str, config: ModelConfig, largest: int) -> ModelConfig:
    """`largest`: layers of the one model in which scores follow the hidden size."""
    size = config.hidden_size / config.num_heads
    return replace(
        config,
        embedding_scale=config.hidden_size**0.5,
        attention_scale=size**-0.5 if config.num_layers == largest else None,
        attention_softcap=_cap(fields, f"{prefix}.attn_logit_softcapping"),
        logits_softcap=_cap(fields, f"{prefix}.final_logit_softcapping"),
    )


def _cap(fields: Fields, key: str) -> float:
    """A soft cap; 0 where there is none."""
    return 0.0 if not fields.values.get(key) else fields.number(key, most=1e6)


def layer_types(count: int, period: int) -> list[str]:
    """Sliding layers, and a full one at the end of each period."""
    kinds = ("full_attention", "sliding_attention")
    return [kinds[(index + 1) % period > 0] for index in range(count)]


ARCHITECTURE = Architecture(
    name="gemma2",
    hf_class="Gemma2ForCausalLM",
    build=build,
    from_hf=from_hf,
    from_gguf=from_gguf,
    gguf_reads=("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
    layer_names=NORM_NAMES,
    activation="gelu_pytorch_tanh",
    is_tied=True,
    hf_norm_offset=1.0,
)

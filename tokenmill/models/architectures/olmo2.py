"""OLMo 2 (OLMo et al. 2024): norms behind each half layer, and on the whole of q and k."""

from tokenmill.ir.build import FunctionBuilder
from tokenmill.ir.graph import Graph, Value
from tokenmill.models.architecture import HEAD_NORM_NAMES, Architecture, refuse_hf_layer_types
from tokenmill.models.architectures import llama
from tokenmill.models.config import LayerKind, ModelConfig
from tokenmill.models.fields import Fields


def build(config: ModelConfig) -> Graph:
    return llama.decoder(config, layer)


def layer(
    f: FunctionBuilder, kind: LayerKind, x: Value, place: Value, config: ModelConfig
) -> Value:
    """x + norm(attention(x)), then x + norm(mlp(x))."""
    h = llama.attention(f, kind, x, place, config, llama.norm)
    x = f.add(x, llama.norm(f, h, "post_attn_norm", config))
    return f.add(x, llama.norm(f, llama.mlp(f, x, config), "post_ffn_norm", config))


def from_hf(fields: Fields, config: ModelConfig) -> ModelConfig:
    refuse_hf_layer_types(fields)
    return config


ARCHITECTURE = Architecture(
    name="olmo2",
    hf_class="Olmo2ForCausalLM",
    build=build,
    from_hf=from_hf,
    layer_names={
        **HEAD_NORM_NAMES,
        "post_attn_norm": ("post_attention_layernorm.weight", "post_attention_norm.weight"),
        "post_ffn_norm": ("post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
    },
)

"""Qwen3 (Yang et al. 2025): Llama with a norm on each head of q and k, before it is turned."""

from tokenmill.ir.build import FunctionBuilder
from tokenmill.ir.graph import Graph, Value
from tokenmill.models.architecture import HEAD_NORM_NAMES, Architecture
from tokenmill.models.architectures import llama, qwen2
from tokenmill.models.config import LayerKind, ModelConfig


def build(config: ModelConfig) -> Graph:
    return llama.decoder(config, layer)


def layer(
    f: FunctionBuilder, kind: LayerKind, x: Value, place: Value, config: ModelConfig
) -> Value:
    h = llama.norm(f, x, "attn_norm", config)
    x = f.add(x, llama.attention(f, kind, h, place, config, head_norm))
    return f.add(x, llama.mlp(f, llama.norm(f, x, "ffn_norm", config), config))


def head_norm(f: FunctionBuilder, x: Value, name: str, config: ModelConfig) -> Value:
    """All heads share the weights."""
    weight = f.weight(name, config.head_dim)
    return f.head_norm(x, weight, head_dim=config.head_dim, eps=config.norm_eps)


ARCHITECTURE = Architecture(
    name="qwen3",
    hf_class="Qwen3ForCausalLM",
    build=build,
    from_hf=qwen2.from_hf,
    layer_names=HEAD_NORM_NAMES,
)

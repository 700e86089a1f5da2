"""Mixtral (Jiang et al. 2024): Mistral with a mixture of experts in place of the MLP.

Its GGUF files call themselves llama, and are told apart by the experts that they list.
"""

from dataclasses import replace

from tokenmill.ir.build import FunctionBuilder
from tokenmill.ir.graph import Graph, Value
from tokenmill.models.architecture import Architecture
from tokenmill.models.architectures import llama, mistral, moe
from tokenmill.models.config import Experts, LayerKind, ModelConfig
from tokenmill.models.fields import Fields


def build(config: ModelConfig) -> Graph:
    return llama.decoder(config, layer)


def layer(
    f: FunctionBuilder, kind: LayerKind, x: Value, place: Value, config: ModelConfig
) -> Value:
    h = llama.norm(f, x, "attn_norm", config)
    x = f.add(x, llama.attention(f, kind, h, place, config))
    return f.add(x, moe.mixture(f, llama.norm(f, x, "ffn_norm", config), config))


def from_hf(fields: Fields, config: ModelConfig) -> ModelConfig:
    count = fields.integer("num_local_experts", most=2**12, default=8)
    experts = Experts(
        count=count,
        per_token=fields.integer("num_experts_per_tok", most=count, default=2),
        size=config.intermediate_size,
        is_renormalized=True,
    )
    return replace(mistral.from_hf(fields, config), experts=experts)


def from_gguf(fields: Fields, config: ModelConfig) -> ModelConfig:
    config = llama.from_gguf(fields, config)
    return moe.gguf_experts(fields, "llama", config, is_renormalized=True)


_MOE = "block_sparse_moe"

ARCHITECTURE = Architecture(
    name="mixtral",
    hf_class="MixtralForCausalLM",
    gguf_name="llama",
    gguf_reads=("attention.sliding_window", "expert_count"),
    build=build,
    from_hf=from_hf,
    from_gguf=from_gguf,
    rope_theta=1_000_000.0,
    layer_names={
        **moe.GGUF_NAMES,
        "router": (f"{_MOE}.gate.weight", "ffn_gate_inp.weight"),
    },
    hf_experts={
        "expert_gate": (f"{_MOE}.experts.", ".w1.weight"),
        "expert_up": (f"{_MOE}.experts.", ".w3.weight"),
        "expert_down": (f"{_MOE}.experts.", ".w2.weight"),
    },
    is_interleaved=True,
)

"""Qwen3-MoE (Yang et al. 2025): Qwen3 with a mixture of experts in place of most MLPs."""

from dataclasses import replace

from tokenmill.ir.build import FunctionBuilder
from tokenmill.ir.graph import Graph, Value
from tokenmill.models.architecture import HEAD_NORM_NAMES, Architecture
from tokenmill.models.architectures import llama, moe, qwen2, qwen3
from tokenmill.models.config import Experts, LayerKind, ModelConfig
from tokenmill.models.fields import Fields


def build(config: ModelConfig) -> Graph:
    return llama.decoder(config, layer)


def layer(
    f: FunctionBuilder, kind: LayerKind, x: Value, place: Value, config: ModelConfig
) -> Value:
    h = llama.norm(f, x, "attn_norm", config)
    x = f.add(x, llama.attention(f, kind, h, place, config, qwen3.head_norm))
    second = llama.mlp if kind.is_dense else moe.mixture
    return f.add(x, second(f, llama.norm(f, x, "ffn_norm", config), config))


def from_hf(fields: Fields, config: ModelConfig) -> ModelConfig:
    config = qwen2.from_hf(fields, config)
    key = "num_experts" if "num_experts" in fields.values else "num_local_experts"
    count = fields.integer(key, most=2**12, default=128)
    experts = Experts(
        count=count,
        per_token=fields.integer("num_experts_per_tok", most=count, default=8),
        size=fields.integer("moe_intermediate_size", most=2**24),
        is_renormalized=fields.flag("norm_topk_prob", default=False),
    )
    step = fields.integer("decoder_sparse_step", most=2**20, default=1)
    dense = fields.values.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise fields.wrong("mlp_only_layers", dense, "a list of layers")
    layers = (
        replace(kind, is_dense=index in dense or (index + 1) % step > 0)
        for index, kind in enumerate(config.layers)
    )
    return replace(config, experts=experts, layers=tuple(layers))


def from_gguf(fields: Fields, config: ModelConfig) -> ModelConfig:
    return moe.gguf_experts(fields, "qwen3moe", config, is_renormalized=True)


ARCHITECTURE = Architecture(
    name="qwen3moe",
    hf_class="Qwen3MoeForCausalLM",
    gguf_reads=("expert_count",),
    build=build,
    from_hf=from_hf,
    from_gguf=from_gguf,
    layer_names={
        **HEAD_NORM_NAMES,
        **moe.GGUF_NAMES,
        "router": ("mlp.gate.weight", "ffn_gate_inp.weight"),
    },
    hf_experts={
        "expert_gate": ("mlp.experts.", ".gate_proj.weight"),
        "expert_up": ("mlp.experts.", ".up_proj.weight"),
        "expert_down": ("mlp.experts.", ".down_proj.weight"),
    },
)

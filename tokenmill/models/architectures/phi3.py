"""Phi-3 and Phi-4 (Abdin et al. 2024): Llama whose files keep q, k, v and gate, up in one tensor.

Of LongRoPE's two lists of factors the short one is used, and the context is the one that the model
was first trained with, unless max_model_len asks for more.
"""

from collections.abc import Mapping
from dataclasses import replace

from tokenmill.models.architecture import Architecture, refuse_hf_layer_types, windowed
from tokenmill.models.architectures import llama
from tokenmill.models.config import ModelConfig, Rope
from tokenmill.models.fields import Fields


def merged(config: ModelConfig) -> Mapping[str, Mapping[str, int]]:
    inner = config.intermediate_size
    return {
        "qkv": {"q": config.q_size, "k": config.kv_size, "v": config.kv_size},
        "gate_up": {"gate": inner, "up": inner},
    }


def from_hf(fields: Fields, config: ModelConfig) -> ModelConfig:
    refuse_hf_layer_types(fields)
    return windowed(config, fields.integer("sliding_window", most=2**30, least=0, default=0))


def from_gguf(fields: Fields, config: ModelConfig) -> ModelConfig:
    grown = fields.number("phi3.rope.scaling.attn_factor", most=1e3, default=1.0)
    layers = tuple(
        kind if kind.rope is None else replace(kind, rope=_grown(kind.rope, grown))
        for kind in config.layers
    )
    config = replace(config, layers=layers)
    key = "phi3.attention.sliding_window"
    return windowed(config, fields.integer(key, most=2**30, least=0, default=0))


def _grown(rope: Rope, magnitude: float) -> Rope:
    beyond = _grown(rope.beyond, magnitude) if rope.beyond else None
    return replace(rope, magnitude=magnitude, beyond=beyond)


ARCHITECTURE = Architecture(
    name="phi3",
    hf_class="Phi3ForCausalLM",
    build=llama.build,
    from_hf=from_hf,
    from_gguf=from_gguf,
    gguf_reads=("attention.sliding_window",),
    layer_names={
        "qkv": ("self_attn.qkv_proj.weight", "attn_qkv.weight"),
        "gate_up": ("mlp.gate_up_proj.weight", "ffn_up.weight"),
    },
    merged=merged,
    may_turn_partly=True,
)

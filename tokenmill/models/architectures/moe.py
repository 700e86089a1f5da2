"""What architectures with mixtures of experts share: the layer's second half, and its names."""

from dataclasses import replace

from tokenmill.ir.build import FunctionBuilder
from tokenmill.ir.graph import Value
from tokenmill.models.architecture import Names
from tokenmill.models.config import Experts, ModelConfig
from tokenmill.models.fields import Fields

GGUF_NAMES: Names = {
    "router": ("", "ffn_gate_inp.weight"),
    "expert_gate": ("", "ffn_gate_exps.weight"),
    "expert_up": ("", "ffn_up_exps.weight"),
    "expert_down": ("", "ffn_down_exps.weight"),
}
"""GGUF files keep the experts of a layer in one tensor, as we do."""


def mixture(f: FunctionBuilder, h: Value, config: ModelConfig) -> Value:
    """The weighted sum of what the chosen experts make of each token (Shazeer et al. 2017)."""
    experts, hidden = config.experts, config.hidden_size
    assert experts is not None
    count, inner = experts.count, experts.size
    logits = f.linear(h, f.weight("router", count, hidden))
    routes = f.route(logits, top_k=experts.per_token, renormalize=experts.is_renormalized)
    groups = f.group(routes)
    x = f.dispatch(h, groups)
    gate = f.expert_linear(x, f.weight("expert_gate", count * inner, hidden), groups)
    up = f.expert_linear(x, f.weight("expert_up", count * inner, hidden), groups)
    down = f.weight("expert_down", count * hidden, inner)
    y = f.expert_linear(f.mul(f.silu(gate), up), down, groups)
    return f.combine(y, routes, groups)


def gguf_experts(
    fields: Fields, prefix: str, config: ModelConfig, *, is_renormalized: bool
) -> ModelConfig:
    """The config with the experts that GGUF metadata tells of."""
    fields.require(
        {
            f"{prefix}.expert_shared_count": (0,),
            f"{prefix}.expert_group_count": (0, 1),
            f"{prefix}.expert_gating_func": (1,),  # softmax
            f"{prefix}.expert_weights_scale": (0, 1),
        }
    )
    count = fields.integer(f"{prefix}.expert_count", most=2**12)
    experts = Experts(
        count=count,
        per_token=fields.integer(f"{prefix}.expert_used_count", most=count),
        size=fields.integer(
            f"{prefix}.expert_feed_forward_length",
            most=2**24,
            default=config.intermediate_size,
        ),
        is_renormalized=is_renormalized,
    )
    return replace(config, experts=experts)

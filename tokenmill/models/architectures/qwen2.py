"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases on q, k and v."""

from tokenmill.models.architecture import Architecture, refuse_hf_layer_types, with_layer_types
from tokenmill.models.architectures import llama
from tokenmill.models.config import ModelConfig
from tokenmill.models.fields import Fields


def from_hf(fields: Fields, config: ModelConfig) -> ModelConfig:
    """A window, where it is used, holds for the layers from `max_window_layers` on."""
    if not fields.flag("use_sliding_window", default=False):
        refuse_hf_layer_types(fields)
        return config
    window = fields.integer("sliding_window", most=2**30, default=2**30)
    first = fields.integer("max_window_layers", most=2**30, least=0, default=config.num_layers)
    kinds = ["sliding_attention"] * config.num_layers
    kinds[:first] = ["full_attention"] * min(first, config.num_layers)
    return with_layer_types(fields, config, kinds, window)


ARCHITECTURE = Architecture(
    name="qwen2",
    hf_class="Qwen2ForCausalLM",
    build=llama.build,
    from_hf=from_hf,
    has_attention_bias=True,
)

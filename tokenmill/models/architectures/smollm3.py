"""SmolLM3 (Bakouch et al. 2025): Llama in which some layers are not told positions (NoPE)."""

from collections.abc import Sequence
from dataclasses import replace

from tokenmill.models.architecture import Architecture, refuse_hf_layer_types
from tokenmill.models.architectures import llama
from tokenmill.models.config import ModelConfig
from tokenmill.models.fields import Fields

_INTERVAL = 4  # every fourth layer; GGUF files do not say


def from_hf(fields: Fields, config: ModelConfig) -> ModelConfig:
    fields.require({"use_sliding_window": (False,)})
    refuse_hf_layer_types(fields)
    interval = fields.integer("no_rope_layer_interval", most=10_000, default=_INTERVAL)
    has_rope = fields.values.get("no_rope_layers") or _every(interval, config)
    count = config.num_layers
    if not isinstance(has_rope, list) or len(has_rope) < count or set(has_rope) - {0, 1}:
        raise fields.wrong("no_rope_layers", has_rope, f"{count} entries of 0 or 1")
    return with_rope(config, has_rope[:count])


def from_gguf(fields: Fields, config: ModelConfig) -> ModelConfig:
    return with_rope(config, _every(_INTERVAL, config))


def _every(interval: int, config: ModelConfig) -> list[int]:
    return [int((index + 1) % interval > 0) for index in range(config.num_layers)]


def with_rope(config: ModelConfig, has_rope: Sequence[int]) -> ModelConfig:
    """The config in which only the layers marked 1 turn their heads."""
    layers = (
        kind if has else replace(kind, rope=None)
        for kind, has in zip(config.layers, has_rope, strict=True)
    )
    return replace(config, layers=tuple(layers))


ARCHITECTURE = Architecture(
    name="smollm3",
    hf_class="SmolLM3ForCausalLM",
    build=llama.build,
    from_hf=from_hf,
    from_gguf=from_gguf,
    rope_theta=2_000_000.0,
    is_tied=True,
    is_interleaved=True,
)

"""Mistral (Jiang et al. 2023): Llama in which a token sees a sliding window of positions.

Its GGUF files call themselves llama.
"""

from tokenmill.models.architecture import Architecture, refuse_hf_layer_types, windowed
from tokenmill.models.architectures import llama
from tokenmill.models.config import ModelConfig
from tokenmill.models.fields import Fields


def from_hf(fields: Fields, config: ModelConfig) -> ModelConfig:
    refuse_hf_layer_types(fields)
    return windowed(config, fields.integer("sliding_window", most=2**30, least=0, default=0))


ARCHITECTURE = Architecture(
    name="mistral",
    hf_class="MistralForCausalLM",
    gguf_name="",
    build=llama.build,
    from_hf=from_hf,
)

"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases on q, k and v."""

from dataclasses import replace

from tokenmill.ir.graph import Graph
from tokenmill.models import llama
from tokenmill.models.config import ModelConfig


def build(config: ModelConfig) -> Graph:
    """Llama's graph; the biases are part of the architecture, not of the config."""
    return llama.build(replace(config, has_attention_bias=True))

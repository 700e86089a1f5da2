"""Gemma 3, text (Gemma team 2025): Gemma 2 with a norm on each head, and two kinds of layers.

Most layers see a sliding window and turn by a short rope; every sixth sees everything, by a long
one. EmbeddingGemma (Vera et al. 2025) is the same, but that tokens see both ways.
"""

from collections.abc import Sequence
from dataclasses import replace

from tokenmill.ir.build import FunctionBuilder
from tokenmill.ir.graph import Graph, Value
from tokenmill.models import rope_scaling
from tokenmill.models.architecture import HEAD_NORM_NAMES, Architecture, with_layer_types
from tokenmill.models.architectures import gemma2, llama, qwen3
from tokenmill.models.config import Encoder, LayerKind, ModelConfig, Rope
from tokenmill.models.fields import Fields
from tokenmill.models.rope_scaling import Head

_PERIOD = 6
_SHORT_THETA = 10_000.0
_LARGEST = 62  # layers of the model whose scores are scaled by hidden size; GGUF files do not say


def build(config: ModelConfig) -> Graph:
    return llama.decoder(config, layer)


def layer(
    f: FunctionBuilder, kind: LayerKind, x: Value, place: Value, config: ModelConfig
) -> Value:
    return gemma2.layer(f, kind, x, place, config, qwen3.head_norm)


def hf_rope(fields: Fields, head: Head) -> Rope:
    """That of full layers; newer files have one `rope_parameters` for each kind."""
    return rope_scaling.hf_rope(of_kind(fields, "full_attention"), head)


def of_kind(fields: Fields, kind: str) -> Fields:
    both = fields.values.get("rope_parameters")
    if not isinstance(both, dict) or kind not in both:
        return fields
    return Fields(f"{fields.where}: {kind}", {"rope_parameters": both[kind]})


def from_hf(fields: Fields, config: ModelConfig) -> ModelConfig:
    theta = fields.number("rope_local_base_freq", most=1e12, default=_SHORT_THETA)
    short = Rope(theta=theta)
    own = of_kind(fields, "sliding_attention")
    if own is not fields:
        length = config.context_length
        head = Head(dim=config.head_dim, theta=theta, context_length=length)
        short = rope_scaling.hf_rope(own, head)
    period = fields.integer("sliding_window_pattern", most=2**30, default=_PERIOD)
    window = fields.integer("sliding_window", most=2**30, default=4096)
    if fields.flag("use_bidirectional_attention", default=False):
        window = window // 2 + 1  # files count what is before and behind a token together
        config = replace(config, has_head=False, encoder=Encoder())
    kinds = gemma2.layer_types(config.num_layers, period)
    return gemma2.with_hf_scales(fields, _two_kinds(fields, config, kinds, window, short))


def from_gguf(fields: Fields, config: ModelConfig) -> ModelConfig:
    theta = fields.number("gemma3.rope.freq_base_swa", most=1e12, default=_SHORT_THETA)
    window = fields.integer("gemma3.attention.sliding_window", most=2**30, default=4096)
    fields.require({"gemma3.attention.sliding_window_pattern": (_PERIOD,)})
    kinds = gemma2.layer_types(config.num_layers, _PERIOD)
    config = _two_kinds(fields, config, kinds, window, Rope(theta=theta))
    return gemma2.with_gguf_scales(fields, "gemma3", config, _LARGEST)


def _two_kinds(
    fields: Fields, config: ModelConfig, kinds: Sequence[str], window: int, short: Rope
) -> ModelConfig:
    """The config whose sliding layers have their window, and their own rope."""
    config = with_layer_types(fields, config, kinds, window)
    layers = tuple(replace(k, rope=short) if k.window else k for k in config.layers)
    return replace(config, layers=layers)


ARCHITECTURE = Architecture(
    name="gemma3",
    hf_class="Gemma3ForCausalLM",
    hf_bare="Gemma3TextModel",
    build=build,
    from_hf=from_hf,
    from_gguf=from_gguf,
    gguf_reads=("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
    hf_rope=hf_rope,
    layer_names={**HEAD_NORM_NAMES, **gemma2.NORM_NAMES},
    rope_theta=1_000_000.0,
    activation="gelu_pytorch_tanh",
    is_tied=True,
    hf_norm_offset=1.0,
)

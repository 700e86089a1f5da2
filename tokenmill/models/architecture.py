"""What is known of one architecture: its graph, and how files describe it and name its tensors.

An architecture is one file with a `build` and an ARCHITECTURE, and a line in `registry.py`.
Canonical names: `embed`, `final_norm`, `lm_head` (absent when tied), and for layer i
`layers.{i}.` followed by the keys of `LAYER_NAMES` and of the architecture's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tokenmill.ir.graph import Graph
from tokenmill.models.config import ModelConfig, Rope
from tokenmill.models.fields import Fields
from tokenmill.models.rope_scaling import Head, hf_rope

Names = Mapping[str, tuple[str, str]]
"""Canonical name to the names in Hugging Face's files and in GGUF files; "" where it has none."""

Complete = Callable[[Fields, ModelConfig], ModelConfig]
"""Adds to a config what only this architecture has, and refuses what it cannot compute with."""

HF_MODEL_PREFIX = "model."
HF_LAYER_PREFIX = f"{HF_MODEL_PREFIX}layers."
GGUF_LAYER_PREFIX = "blk."

MODEL_NAMES: Names = {
    "embed": ("model.embed_tokens.weight", "token_embd.weight"),
    "final_norm": ("model.norm.weight", "output_norm.weight"),
    "lm_head": ("lm_head.weight", "output.weight"),
}
LAYER_NAMES: Names = {
    "attn_norm": ("input_layernorm.weight", "attn_norm.weight"),
    "q": ("self_attn.q_proj.weight", "attn_q.weight"),
    "k": ("self_attn.k_proj.weight", "attn_k.weight"),
    "v": ("self_attn.v_proj.weight", "attn_v.weight"),
    "o": ("self_attn.o_proj.weight", "attn_output.weight"),
    "q_bias": ("self_attn.q_proj.bias", "attn_q.bias"),
    "k_bias": ("self_attn.k_proj.bias", "attn_k.bias"),
    "v_bias": ("self_attn.v_proj.bias", "attn_v.bias"),
    "ffn_norm": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "gate": ("mlp.gate_proj.weight", "ffn_gate.weight"),
    "up": ("mlp.up_proj.weight", "ffn_up.weight"),
    "down": ("mlp.down_proj.weight", "ffn_down.weight"),
}
HEAD_NORM_NAMES: Names = {
    "q_norm": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "k_norm": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
}


def nothing_merged(config: ModelConfig) -> Mapping[str, Mapping[str, int]]:
    return {}


def nothing_unused(config: ModelConfig) -> frozenset[str]:
    return frozenset()


def keep(fields: Fields, config: ModelConfig) -> ModelConfig:
    """For an architecture that adds nothing of its own."""
    return config


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One row of the table of architectures.

    A name in `model_names` or `layer_names` wins over `MODEL_NAMES` or `LAYER_NAMES`.
    `hf_experts` says what stands before and behind the number of an expert in the names of tensors
    that become one of ours. `merged` tells of tensors that files keep in one: by canonical name of
    the whole, the rows that each part takes, in order. `unused` names tensors that files may have
    and nothing needs.
    """

    name: str
    hf_class: str
    hf_bare: str = ""  # the class without a head, where its name does not follow from `hf_class`
    hf_others: tuple[str, ...] = ()  # further class names
    hf_keys: Mapping[str, str] = field(default_factory=dict)  # key of others' config.json: its own
    hf_prefix: str = ""  # what may stand before all names in Hugging Face's files
    hf_layer_prefix: str = HF_LAYER_PREFIX
    build: Callable[[ModelConfig], Graph]
    from_hf: Complete
    from_gguf: Complete = keep
    gguf_name: str | None = None  # general.architecture, where that is not `name`
    gguf_reads: tuple[str, ...] = ()  # metadata that only some architectures have
    gguf_norm_eps: str = "attention.layer_norm_rms_epsilon"
    hf_rope: Callable[[Fields, Head], Rope] = hf_rope
    rope_theta: float = 10_000.0  # where config.json does not say
    activation: str = "silu"
    is_tied: bool = False  # where config.json does not say
    model_names: Names = field(default_factory=dict)
    layer_names: Names = field(default_factory=dict)
    unused: Callable[[ModelConfig], frozenset[str]] = nothing_unused
    hf_experts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    merged: Callable[[ModelConfig], Mapping[str, Mapping[str, int]]] = nothing_merged
    is_interleaved: bool = False  # GGUF files keep rows that rope turns together side by side
    has_attention_bias: bool = False
    may_turn_partly: bool = False  # only the first dimensions of a head turn
    hf_norm_offset: float = 0.0  # what is missing in Hugging Face's norm weights

    @property
    def hf_classes(self) -> tuple[str, ...]:
        """Class names that config.json may have; last that of AutoModel, which has no head."""
        bare = self.hf_bare or self.hf_class.replace("ForCausalLM", "Model")
        return tuple(dict.fromkeys((self.hf_class, *self.hf_others, bare)))


def refuse_hf_layer_types(fields: Fields) -> None:
    """For an architecture whose layers are all alike."""
    kinds = fields.values.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list) or any(k != "full_attention" for k in kinds)
    ):
        raise fields.unsupported("layer_types", kinds, "'full_attention' in every layer")


def windowed(config: ModelConfig, window: int) -> ModelConfig:
    """The config with one sliding window in every layer; 0: none."""
    return replace(config, layers=tuple(replace(kind, window=window) for kind in config.layers))


def with_layer_types(
    fields: Fields, config: ModelConfig, default: Sequence[str], window: int
) -> ModelConfig:
    """The config with `window` in those layers that `layer_types` calls sliding."""
    kinds = fields.values.get("layer_types", default)
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, Sequence) or any(kind not in known for kind in kinds):
        raise fields.unsupported("layer_types", kinds, " and ".join(map(repr, known)))
    if len(kinds) != config.num_layers:
        raise fields.wrong("layer_types", kinds, f"{config.num_layers} entries, one a layer")
    wide = windowed(config, window)
    pairs = zip(kinds, config.layers, wide.layers, strict=True)
    return replace(config, layers=tuple(b if k == known[1] else a for k, a, b in pairs))

"""ModernBERT (Warner et al. 2024): an encoder with rotary positions, norms before each half layer
and a gated MLP, in which two of three layers see a window that reaches both ways. No biases.
"""

from collections.abc import Mapping
from dataclasses import replace

from tokenmill.ir.build import FunctionBuilder, finish_graph
from tokenmill.ir.graph import Graph, Value
from tokenmill.models import rope_scaling
from tokenmill.models.architecture import Architecture, with_layer_types
from tokenmill.models.architectures import gemma3, llama
from tokenmill.models.config import Encoder, LayerKind, ModelConfig, Rope
from tokenmill.models.fields import Fields
from tokenmill.models.rope_scaling import Head

_PERIOD = 3
_WINDOW = 128
_THETA, _SHORT_THETA = 160_000.0, 10_000.0


def build(config: ModelConfig) -> Graph:
    """The step: an embedding, layers, a norm of the tokens to pool."""
    f = FunctionBuilder("main")
    tokens, place = f.param("tokens", "i32", "T"), f.param("place", "place", "T")
    pooled = f.param("pooled", "i32", "E")

    x = f.embed(tokens, f.weight("embed", config.vocab_size, config.hidden_size))
    x = norm(f, x, "embed_norm", config)
    x = f.repeat_kinds(config.layers, lambda g, kind, x, p: layer(g, kind, x, p, config), x, place)
    x = norm(f, f.select_rows(x, pooled), "final_norm", config)
    return finish_graph(config.architecture, f, x)


def layer(
    f: FunctionBuilder, kind: LayerKind, x: Value, place: Value, config: ModelConfig
) -> Value:
    """x + attention(norm(x)), then x + mlp(norm(x)); the first layer's input is normed already."""
    h = x if kind.is_first else norm(f, x, "attn_norm", config)
    x = f.add(x, llama.attention(f, kind, h, place, config))
    h = norm(f, x, "ffn_norm", config)
    return f.add(x, llama.mlp(f, h, config, FunctionBuilder.gelu_erf))


def norm(f: FunctionBuilder, x: Value, name: str, config: ModelConfig) -> Value:
    return f.layer_norm(x, f.weight(name, x.type.width), eps=config.norm_eps)


def merged(config: ModelConfig) -> Mapping[str, Mapping[str, int]]:
    inner = config.intermediate_size
    return {
        "qkv": {"q": config.q_size, "k": config.kv_size, "v": config.kv_size},
        "gate_up": {"gate": inner, "up": inner},
    }


def hf_rope(fields: Fields, head: Head) -> Rope:
    """That of full layers."""
    theta = fields.number("global_rope_theta", most=1e12, default=head.theta)
    return rope_scaling.hf_rope(
        gemma3.of_kind(fields, "full_attention"), replace(head, theta=theta)
    )


def from_hf(fields: Fields, config: ModelConfig) -> ModelConfig:
    fields.require({"norm_bias": (False,)})
    theta = fields.number("local_rope_theta", most=1e12, default=_SHORT_THETA)
    head = Head(dim=config.head_dim, theta=theta, context_length=config.context_length)
    own = gemma3.of_kind(fields, "sliding_attention")
    short = Rope(theta=theta) if own is fields else rope_scaling.hf_rope(own, head)
    period = fields.integer("global_attn_every_n_layers", most=2**30, default=_PERIOD)
    kinds = [f"{'sliding' if i % period else 'full'}_attention" for i in range(config.num_layers)]
    # Files count what is before and behind a token together.
    window = fields.integer("local_attention", most=2**30, least=2, default=_WINDOW) // 2 + 1
    config = with_layer_types(fields, config, kinds, window)
    layers = [replace(k, rope=short) if k.window else k for k in config.layers]
    layers[0] = replace(layers[0], is_first=True)
    return replace(
        config,
        layers=tuple(layers),
        norm_eps=fields.number("norm_eps", most=0.1, default=1e-5),
        has_head=False,
        encoder=Encoder(),
    )


ARCHITECTURE = Architecture(
    name="modernbert",
    hf_class="ModernBertModel",
    build=build,
    from_hf=from_hf,
    gguf_name="",
    hf_rope=hf_rope,
    rope_theta=_THETA,
    activation="gelu",
    is_tied=True,
    model_names={
        "embed": ("embeddings.tok_embeddings.weight", ""),
        "embed_norm": ("embeddings.norm.weight", ""),
        "final_norm": ("final_norm.weight", ""),
    },
    layer_names={
        "attn_norm": ("attn_norm.weight", ""),
        "qkv": ("attn.Wqkv.weight", ""),
        "o": ("attn.Wo.weight", ""),
        "ffn_norm": ("mlp_norm.weight", ""),
        "gate_up": ("mlp.Wi.weight", ""),
        "down": ("mlp.Wo.weight", ""),
    },
    hf_prefix="model.",
    hf_layer_prefix="layers.",
    merged=merged,
)

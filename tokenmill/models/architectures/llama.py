"""Llama (Touvron et al. 2023), and every model that has its shape: SmolLM2 among them.

A decoder with RMS norms before each half layer, rotary positions, grouped query heads and a
SiLU-gated MLP. The other architectures are built of the same functions; what a config leaves at
its default (scales of 1, no window) adds nothing to the graph.
"""

from collections.abc import Callable

from tokenmill.ir.build import FunctionBuilder, finish_graph
from tokenmill.ir.graph import Graph, Value
from tokenmill.models.architecture import Architecture, refuse_hf_layer_types, windowed
from tokenmill.models.config import LayerKind, ModelConfig
from tokenmill.models.fields import Fields

Bend = Callable[[FunctionBuilder, Value], Value]
HeadNorm = Callable[[FunctionBuilder, Value, str, ModelConfig], Value]
Layer = Callable[[FunctionBuilder, LayerKind, Value, Value, ModelConfig], Value]


def build(config: ModelConfig) -> Graph:
    return decoder(config, layer)


def decoder(config: ModelConfig, layer: Layer) -> Graph:
    """The step: embed, layers, norm, logits of the wanted rows, sample.

    A model without a head ends in the normed states of the tokens to pool.
    """
    f = FunctionBuilder("main")
    tokens, place = f.param("tokens", "i32", "T"), f.param("place", "place", "T")
    rows = f.param("rows", "i32", "R") if config.has_head else f.param("pooled", "i32", "E")

    table = f.weight("embed", config.vocab_size, config.hidden_size)
    x = f.scale(f.embed(tokens, table), config.embedding_scale)
    x = f.repeat_kinds(config.layers, lambda g, kind, x, p: layer(g, kind, x, p, config), x, place)
    x = f.select_rows(x, rows)
    x = norm(f, x, "final_norm", config)
    if not config.has_head:
        return finish_graph(config.architecture, f, x)
    sampling = f.param("sampling", "sampling", "R")
    head = table if config.is_tied else f.weight("lm_head", config.vocab_size, config.hidden_size)
    logits = f.scale(f.linear(x, head), config.logits_scale)
    logits = f.softcap(logits, config.logits_softcap)
    return finish_graph(config.architecture, f, logits, f.sample(logits, sampling))


def layer(
    f: FunctionBuilder, kind: LayerKind, x: Value, place: Value, config: ModelConfig
) -> Value:
    """x + attention(norm(x)), then x + mlp(norm(x))."""
    h = attention(f, kind, norm(f, x, "attn_norm", config), place, config)
    x = f.add(x, f.scale(h, config.residual_scale))
    h = mlp(f, norm(f, x, "ffn_norm", config), config)
    return f.add(x, f.scale(h, config.residual_scale))


def norm(f: FunctionBuilder, x: Value, name: str, config: ModelConfig) -> Value:
    """The RMS norm of a whole row."""
    return f.rmsnorm(x, f.weight(name, int(x.type.shape[1])), eps=config.norm_eps)


def no_head_norm(f: FunctionBuilder, x: Value, name: str, config: ModelConfig) -> Value:
    return x


def attention(
    f: FunctionBuilder,
    kind: LayerKind,
    h: Value,
    place: Value,
    config: ModelConfig,
    head_norm: HeadNorm = no_head_norm,
) -> Value:
    """Grouped-query attention over the cache, this step's keys and values included."""
    head_dim = config.head_dim
    q = project(f, h, "q", config.q_size, config)
    k = project(f, h, "k", config.kv_size, config)
    v = project(f, h, "v", config.kv_size, config)
    q, k = head_norm(f, q, "q_norm", config), head_norm(f, k, "k_norm", config)
    if kind.rope is not None:
        q = f.rope(q, place, head_dim=head_dim, **kind.rope.attrs)
        k = f.rope(k, place, head_dim=head_dim, **kind.rope.attrs)
    is_causal = config.encoder is None
    # What is behind a window in a text that is read at once may still be seen from there.
    kv = f.kv_write(k, v, place, head_dim=head_dim, window=kind.window if is_causal else 0)
    out = f.attention(
        q,
        kv,
        place,
        head_dim=head_dim,
        scale=config.score_scale,
        window=kind.window,
        softcap=config.attention_softcap,
        is_causal=is_causal,
    )
    return f.linear(out, f.weight("o", config.hidden_size, config.q_size))


def project(f: FunctionBuilder, h: Value, name: str, size: int, config: ModelConfig) -> Value:
    """One of q, k and v, with a bias where the config has one."""
    bias = f.weight(f"{name}_bias", size) if config.has_attention_bias else None
    return f.linear(h, f.weight(name, size, config.hidden_size), bias)


def mlp(
    f: FunctionBuilder, h: Value, config: ModelConfig, bend: Bend = FunctionBuilder.silu
) -> Value:
    """down(silu(gate(h)) * up(h))."""
    hidden, inner = config.hidden_size, config.intermediate_size
    gate = f.linear(h, f.weight("gate", inner, hidden))
    up = f.linear(h, f.weight("up", inner, hidden))
    return f.linear(f.mul(bend(f, gate), up), f.weight("down", hidden, inner))


def from_hf(fields: Fields, config: ModelConfig) -> ModelConfig:
    fields.require({"sliding_window": ()})
    refuse_hf_layer_types(fields)
    return config


def from_gguf(fields: Fields, config: ModelConfig) -> ModelConfig:
    """Mistral's files are Llama files too."""
    window = fields.integer("llama.attention.sliding_window", most=2**30, least=0, default=0)
    return windowed(config, window)


ARCHITECTURE = Architecture(
    name="llama",
    hf_class="LlamaForCausalLM",
    build=build,
    from_hf=from_hf,
    from_gguf=from_gguf,
    gguf_reads=("attention.sliding_window",),
    is_interleaved=True,
)

"""Llama (Touvron et al. 2023), and every model that has its shape: SmolLM2 among them.

A decoder with RMS norms before each half layer, rotary positions, grouped query heads and a
SiLU-gated MLP.
"""

from tokenmill.ir.build import FunctionBuilder, finish_graph
from tokenmill.ir.graph import Graph, Value
from tokenmill.models.config import ModelConfig


def build(config: ModelConfig) -> Graph:
    """The step: embed, layers, norm, logits of the wanted rows, sample."""
    f = FunctionBuilder("main")
    tokens, place = f.param("tokens", "i32", "T"), f.param("place", "place", "T")
    rows, sampling = f.param("rows", "i32", "R"), f.param("sampling", "sampling", "R")

    table = f.weight("embed", config.vocab_size, config.hidden_size)
    x = f.embed(tokens, table)
    x = f.repeat(config.num_layers, lambda g, x, place: layer(g, x, place, config), x, place)
    x = f.select_rows(x, rows)
    x = f.rmsnorm(x, f.weight("final_norm", config.hidden_size), eps=config.norm_eps)
    head = table if config.is_tied else f.weight("lm_head", config.vocab_size, config.hidden_size)
    logits = f.linear(x, head)
    return finish_graph(config.architecture, f, logits, f.sample(logits, sampling))


def layer(f: FunctionBuilder, x: Value, place: Value, config: ModelConfig) -> Value:
    """x + attention(norm(x)), then x + mlp(norm(x))."""
    h = f.rmsnorm(x, f.weight("attn_norm", config.hidden_size), eps=config.norm_eps)
    x = f.add(x, attention(f, h, place, config))
    h = f.rmsnorm(x, f.weight("ffn_norm", config.hidden_size), eps=config.norm_eps)
    return f.add(x, mlp(f, h, config))


def attention(f: FunctionBuilder, h: Value, place: Value, config: ModelConfig) -> Value:
    """Grouped-query attention over the cache, this step's keys and values included."""
    head_dim, hidden = config.head_dim, config.hidden_size
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    q = project(f, h, "q", q_size, config)
    k = project(f, h, "k", kv_size, config)
    v = project(f, h, "v", kv_size, config)
    q = f.rope(q, place, head_dim=head_dim, theta=config.rope_theta)
    k = f.rope(k, place, head_dim=head_dim, theta=config.rope_theta)
    kv = f.kv_write(k, v, place, head_dim=head_dim)
    out = f.attention(q, kv, place, head_dim=head_dim, scale=head_dim**-0.5)
    return f.linear(out, f.weight("o", hidden, q_size))


def project(f: FunctionBuilder, h: Value, name: str, size: int, config: ModelConfig) -> Value:
    """One of q, k and v, with a bias where the config has one."""
    bias = f.weight(f"{name}_bias", size) if config.has_attention_bias else None
    return f.linear(h, f.weight(name, size, config.hidden_size), bias)


def mlp(f: FunctionBuilder, h: Value, config: ModelConfig) -> Value:
    """down(silu(gate(h)) * up(h))."""
    hidden, inner = config.hidden_size, config.intermediate_size
    gate = f.linear(h, f.weight("gate", inner, hidden))
    up = f.linear(h, f.weight("up", inner, hidden))
    return f.linear(f.mul(f.silu(gate), up), f.weight("down", hidden, inner))

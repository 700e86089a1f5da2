"""BERT (Devlin et al. 2018), MiniLM and their like: encoders, where every token sees every other.

Positions and segments are learned, each half layer is normed behind its residual, and there is no
head for words: what the last layer made of some tokens is returned, or what a classifier of one
label makes of them (a cross-encoder's score).
"""

from dataclasses import replace

from tokenmill.ir.build import FunctionBuilder, finish_graph
from tokenmill.ir.graph import Graph, Value
from tokenmill.models.architecture import Architecture, Names
from tokenmill.models.config import Encoder, LayerKind, ModelConfig
from tokenmill.models.fields import Fields

CLASSIFIER = "ForSequenceClassification"
"""How the names of classes end that have a classifier."""

MODEL_NAMES: Names = {
    "embed": ("embeddings.word_embeddings.weight", ""),
    "positions": ("embeddings.position_embeddings.weight", ""),
    "segments": ("embeddings.token_type_embeddings.weight", ""),
    "embed_norm": ("embeddings.LayerNorm.weight", ""),
    "embed_norm_bias": ("embeddings.LayerNorm.bias", ""),
    "pooler": ("pooler.dense.weight", ""),
    "pooler_bias": ("pooler.dense.bias", ""),
    "classifier": ("classifier.weight", ""),
    "classifier_bias": ("classifier.bias", ""),
}
_LAYER_PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
LAYER_NAMES: Names = {
    f"{ours}{behind}": (f"{theirs}.{kind}", "")
    for ours, theirs in _LAYER_PARTS.items()
    for behind, kind in (("", "weight"), ("_bias", "bias"))
}
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")  # files have them now and then


def build(config: ModelConfig) -> Graph:
    """The step: three embeddings, layers, and what was made of the tokens to pool."""
    assert config.encoder is not None
    f = FunctionBuilder("main")
    tokens, place = f.param("tokens", "i32", "T"), f.param("place", "place", "T")
    pooled = f.param("pooled", "i32", "E")

    encoder, hidden = config.encoder, config.hidden_size
    x = f.embed(tokens, f.weight("embed", config.vocab_size, hidden))
    table = f.weight("segments", encoder.num_segments, hidden)
    x = f.add(x, f.embed_place(place, table, by="segment"))
    table = f.weight("positions", encoder.num_positions, hidden)
    positions = f.embed_place(place, table, by="position", offset=encoder.first_position)
    x = norm(f, f.add(x, positions), "embed_norm", config)
    x = f.repeat_kinds(config.layers, lambda g, kind, x, p: layer(g, kind, x, p, config), x, place)
    x = f.select_rows(x, pooled)
    return finish_graph(config.architecture, f, classify(f, x, config) if encoder.num_labels else x)


def layer(
    f: FunctionBuilder, kind: LayerKind, x: Value, place: Value, config: ModelConfig
) -> Value:
    """norm(x + attention(x)), then norm(x + mlp(x))."""
    hidden, inner = config.hidden_size, config.intermediate_size
    x = norm(f, f.add(attention(f, x, place, config), x), "attn_norm", config)
    h = f.gelu_erf(linear(f, x, "up", inner))
    return norm(f, f.add(linear(f, h, "down", hidden), x), "ffn_norm", config)


def attention(f: FunctionBuilder, x: Value, place: Value, config: ModelConfig) -> Value:
    """Of every token over all of its sequence."""
    hidden, head_dim = config.hidden_size, config.head_dim
    q, k, v = (linear(f, x, name, hidden) for name in ("q", "k", "v"))
    kv = f.kv_write(k, v, place, head_dim=head_dim)
    out = f.attention(q, kv, place, head_dim=head_dim, scale=config.score_scale, is_causal=False)
    return linear(f, out, "o", hidden)


def classify(f: FunctionBuilder, x: Value, config: ModelConfig) -> Value:
    """A label's logit: a linear of the tanh of a linear."""
    assert config.encoder is not None
    x = f.softcap(linear(f, x, "pooler", config.hidden_size), 1.0)
    return linear(f, x, "classifier", config.encoder.num_labels)


def linear(f: FunctionBuilder, x: Value, name: str, size: int) -> Value:
    """With a bias, as all are."""
    return f.linear(x, f.weight(name, size, x.type.width), f.weight(f"{name}_bias", size))


def norm(f: FunctionBuilder, x: Value, name: str, config: ModelConfig) -> Value:
    size = x.type.width
    weight, bias = f.weight(name, size), f.weight(f"{name}_bias", size)
    return f.layer_norm(x, weight, bias, eps=config.norm_eps)


def from_hf(fields: Fields, config: ModelConfig) -> ModelConfig:
    return completed(fields, config, first_position=0)


def completed(fields: Fields, config: ModelConfig, *, first_position: int) -> ModelConfig:
    """`first_position` is that of the first token among the rows of the table of positions."""
    fields.require(
        {
            "position_embedding_type": ("absolute",),
            "is_decoder": (False,),
            "add_cross_attention": (False,),
        }
    )
    num_positions = fields.integer("max_position_embeddings", most=2**20, least=first_position + 1)
    encoder = Encoder(
        num_positions=num_positions,
        first_position=first_position,
        num_segments=fields.integer("type_vocab_size", most=2**10, default=2),
        num_labels=_num_labels(fields),
    )
    return replace(
        config,
        layers=(LayerKind(rope=None),) * config.num_layers,
        norm_eps=fields.number("layer_norm_eps", most=0.1, default=1e-12),
        context_length=num_positions - first_position,
        has_head=False,
        encoder=encoder,
    )


def _num_labels(fields: Fields) -> int:
    """Of the classifier, if the model is one; only a score has a meaning here."""
    names = fields.values.get("architectures")
    if not isinstance(names, list) or not str(names[0]).endswith(CLASSIFIER):
        return 0
    labels = fields.values.get("id2label")
    count = len(labels) if isinstance(labels, dict) else fields.values.get("num_labels", 2)
    if count != 1:
        raise fields.unsupported("id2label", labels or count, "one label, whose logit is a score")
    return 1


def unused(config: ModelConfig) -> frozenset[str]:
    """The pooler of a model that is no classifier: it was there for training."""
    assert config.encoder is not None
    poolers = () if config.encoder.num_labels else ("pooler", "pooler_bias")
    return frozenset((*_BUFFERS, *poolers))


ARCHITECTURE = Architecture(
    name="bert",
    hf_class="BertModel",
    hf_others=(f"Bert{CLASSIFIER}",),
    build=build,
    from_hf=from_hf,
    gguf_name="",
    activation="gelu",
    is_tied=True,
    has_attention_bias=True,
    model_names=MODEL_NAMES,
    layer_names=LAYER_NAMES,
    hf_prefix="bert.",
    hf_layer_prefix="encoder.layer.",
    unused=unused,
)

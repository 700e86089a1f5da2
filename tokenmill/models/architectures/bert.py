"""BERT (Devlin et al. 2018), MiniLM and their like: encoders, where every token sees every other.

Positions and segments are learned, each half layer is normed behind its residual, and there is no
head for words: what the last layer made of some tokens is returned, or what a classifier of one
label makes of them (a cross-encoder's score).
"""

from collections.abc import Callable
from dataclasses import replace

from tokenmill.ir.build import FunctionBuilder, finish_graph
from tokenmill.ir.graph import Graph, Value
from tokenmill.models.architecture import Architecture, Names
from tokenmill.models.config import Encoder, LayerKind, ModelConfig
from tokenmill.models.fields import Fields

CLASSIFIER = "ForSequenceClassification"
"""How the names of classes end that have a classifier."""

MODEL_NAMES: Names = {
    "embed": ("embeddings.word_embeddings.weight", "token_embd.weight"),
    "positions": ("embeddings.position_embeddings.weight", "position_embd.weight"),
    "segments": ("embeddings.token_type_embeddings.weight", "token_types.weight"),
    "embed_norm": ("embeddings.LayerNorm.weight", "token_embd_norm.weight"),
    "embed_norm_bias": ("embeddings.LayerNorm.bias", "token_embd_norm.bias"),
    "pooler": ("pooler.dense.weight", "cls.weight"),
    "pooler_bias": ("pooler.dense.bias", "cls.bias"),
    "classifier": ("classifier.weight", "cls.output.weight"),
    "classifier_bias": ("classifier.bias", "cls.output.bias"),
}


def with_biases(parts: Names) -> Names:
    """The names of weights and biases, from those of the modules that have both."""
    return {
        f"{ours}{behind}": (f"{hf}.{kind}", f"{gguf}.{kind}")
        for ours, (hf, gguf) in parts.items()
        for behind, kind in (("", "weight"), ("_bias", "bias"))
    }


LAYER_NAMES = with_biases(
    {
        "q": ("attention.self.query", "attn_q"),
        "k": ("attention.self.key", "attn_k"),
        "v": ("attention.self.value", "attn_v"),
        "o": ("attention.output.dense", "attn_output"),
        "attn_norm": ("attention.output.LayerNorm", "attn_output_norm"),
        "up": ("intermediate.dense", "ffn_up"),
        "down": ("output.dense", "ffn_down"),
        "ffn_norm": ("output.LayerNorm", "layer_output_norm"),
    }
)
_RANK = 4  # value of pooling_type: the file is a cross-encoder
GGUF_READS = ("attention.causal",)
GGUF_NORM_EPS = "attention.layer_norm_epsilon"
Layer = Callable[[FunctionBuilder, LayerKind, Value, Value, ModelConfig], Value]
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")  # files have them now and then


def build(config: ModelConfig) -> Graph:
    return encoder(config, layer)


def encoder(config: ModelConfig, layer: Layer) -> Graph:
    """The step: embeddings of all kinds, layers, and what was made of the tokens to pool."""
    assert config.encoder is not None
    f = FunctionBuilder("main")
    tokens, place = f.param("tokens", "i32", "T"), f.param("place", "place", "T")
    pooled = f.param("pooled", "i32", "E")

    own, hidden = config.encoder, config.hidden_size
    x = f.embed(tokens, f.weight("embed", config.vocab_size, hidden))
    if own.num_segments:
        table = f.weight("segments", own.num_segments, hidden)
        x = f.add(x, f.embed_place(place, table, by="segment"))
    if own.num_positions:
        table = f.weight("positions", own.num_positions, hidden)
        x = f.add(x, f.embed_place(place, table, by="position", offset=own.first_position))
    x = norm(f, x, "embed_norm", config)
    x = f.repeat_kinds(config.layers, lambda g, kind, x, p: layer(g, kind, x, p, config), x, place)
    x = f.select_rows(x, pooled)
    return finish_graph(config.architecture, f, classify(f, x, config) if own.num_labels else x)


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


def from_gguf(fields: Fields, config: ModelConfig) -> ModelConfig:
    """Rows of positions that come before the first token's are cut off in these files."""
    tables = Encoder(num_positions=config.context_length, num_segments=gguf_segments(fields))
    layers = (LayerKind(rope=None),) * config.num_layers
    return replace(encoder_of_gguf(fields, config, tables), layers=layers)


def encoder_of_gguf(fields: Fields, config: ModelConfig, tables: Encoder) -> ModelConfig:
    """What all encoders' files say; `tables` are those of this one."""
    p = fields.text("general.architecture")
    fields.require({f"{p}.attention.causal": (False,)})
    is_cross_encoder = fields.values.get(f"{p}.pooling_type") == _RANK
    tables = replace(tables, num_labels=int(is_cross_encoder))
    return replace(config, has_head=False, encoder=tables)


def gguf_segments(fields: Fields) -> int:
    return fields.integer("tokenizer.ggml.token_type_count", most=2**10, default=2)


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
    from_gguf=from_gguf,
    gguf_reads=GGUF_READS,
    gguf_norm_eps=GGUF_NORM_EPS,
    activation="gelu",
    is_tied=True,
    has_attention_bias=True,
    model_names=MODEL_NAMES,
    layer_names=LAYER_NAMES,
    hf_prefix="bert.",
    hf_layer_prefix="encoder.layer.",
    unused=unused,
)

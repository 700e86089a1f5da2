"""nomic-embed-text (Nussbaum et al. 2024): BERT with rotary positions and a gated MLP."""

from collections.abc import Mapping
from dataclasses import replace

from tokenmill.ir.build import FunctionBuilder
from tokenmill.ir.graph import Graph, Value
from tokenmill.models.architecture import Architecture
from tokenmill.models.architectures import bert, llama
from tokenmill.models.config import Encoder, LayerKind, ModelConfig
from tokenmill.models.fields import Fields

_TRAINED = 2048  # tokens of the longest text that it was trained with; files may say more


def build(config: ModelConfig) -> Graph:
    return bert.encoder(config, layer)


def layer(
    f: FunctionBuilder, kind: LayerKind, x: Value, place: Value, config: ModelConfig
) -> Value:
    """norm(x + attention(x)), then norm(x + mlp(x))."""
    h = llama.attention(f, kind, x, place, config)
    x = bert.norm(f, f.add(h, x), "attn_norm", config)
    return bert.norm(f, f.add(llama.mlp(f, x, config), x), "ffn_norm", config)


def merged(config: ModelConfig) -> Mapping[str, Mapping[str, int]]:
    return {"qkv": {"q": config.q_size, "k": config.kv_size, "v": config.kv_size}}


def from_hf(fields: Fields, config: ModelConfig) -> ModelConfig:
    fields.require(
        {
            "activation_function": ("swiglu",),
            "causal": (False,),
            "mlp_fc1_bias": (False,),
            "mlp_fc2_bias": (False,),
            "moe_every_n_layers": (0,),
            "prenorm": (False,),
            "qkv_proj_bias": (False,),
            "rotary_emb_fraction": (1.0,),
            "rotary_emb_interleaved": (False,),
            "rotary_emb_scale_base": (),
        }
    )
    trained = fields.integer("max_trained_positions", most=2**20, default=_TRAINED)
    tables = Encoder(num_segments=fields.integer("type_vocab_size", most=2**10, default=2))
    return replace(
        config,
        norm_eps=fields.number("layer_norm_eps", most=0.1, default=1e-12),
        context_length=min(config.context_length, trained),
        has_head=False,
        encoder=tables,
    )


def from_gguf(fields: Fields, config: ModelConfig) -> ModelConfig:
    tables = Encoder(num_segments=bert.gguf_segments(fields))
    return bert.encoder_of_gguf(fields, config, tables)


ARCHITECTURE = Architecture(
    name="nomic-bert",
    hf_class="NomicBertModel",
    hf_keys={
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "layer_norm_eps": "layer_norm_epsilon",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "rope_theta": "rotary_emb_base",
    },
    build=build,
    from_hf=from_hf,
    from_gguf=from_gguf,
    gguf_reads=bert.GGUF_READS,
    gguf_norm_eps=bert.GGUF_NORM_EPS,
    rope_theta=1000.0,
    is_tied=True,
    model_names={
        **bert.MODEL_NAMES,
        "embed_norm": ("emb_ln.weight", "token_embd_norm.weight"),
        "embed_norm_bias": ("emb_ln.bias", "token_embd_norm.bias"),
    },
    layer_names={
        **bert.with_biases(
            {
                "attn_norm": ("norm1", "attn_output_norm"),
                "ffn_norm": ("norm2", "layer_output_norm"),
            }
        ),
        "qkv": ("attn.Wqkv.weight", "attn_qkv.weight"),
        "o": ("attn.out_proj.weight", "attn_output.weight"),
        "up": ("mlp.fc11.weight", "ffn_up.weight"),
        "gate": ("mlp.fc12.weight", "ffn_gate.weight"),
        "down": ("mlp.fc2.weight", "ffn_down.weight"),
    },
    hf_layer_prefix="encoder.layers.",
    merged=merged,
    unused=bert.unused,
)

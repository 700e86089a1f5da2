"""DistilBERT (Sanh et al. 2019): BERT of fewer layers, which are not told of segments."""

from dataclasses import replace

from tokenmill.models.architecture import Architecture
from tokenmill.models.architectures import bert
from tokenmill.models.config import ModelConfig
from tokenmill.models.fields import Fields


def from_hf(fields: Fields, config: ModelConfig) -> ModelConfig:
    """Files that hold sinusoids hold them as a table, like any other."""
    config = bert.completed(fields, config, first_position=0)
    assert config.encoder is not None
    return replace(config, encoder=replace(config.encoder, num_segments=0))


ARCHITECTURE = Architecture(
    name="distilbert",
    hf_class="DistilBertModel",
    hf_keys={
        "hidden_act": "activation",
        "hidden_size": "dim",
        "intermediate_size": "hidden_dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    },
    build=bert.build,
    from_hf=from_hf,
    gguf_name="",
    activation="gelu",
    is_tied=True,
    has_attention_bias=True,
    model_names=bert.MODEL_NAMES,
    layer_names=bert.with_biases(
        {
            "q": ("attention.q_lin", ""),
            "k": ("attention.k_lin", ""),
            "v": ("attention.v_lin", ""),
            "o": ("attention.out_lin", ""),
            "attn_norm": ("sa_layer_norm", ""),
            "up": ("ffn.lin1", ""),
            "down": ("ffn.lin2", ""),
            "ffn_norm": ("output_layer_norm", ""),
        }
    ),
    hf_prefix="distilbert.",
    hf_layer_prefix="transformer.layer.",
    unused=bert.unused,
)

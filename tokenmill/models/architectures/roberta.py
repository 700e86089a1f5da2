"""RoBERTa (Liu et al. 2019) and XLM-R: BERT whose positions start behind that of padding."""

from tokenmill.models.architecture import Architecture
from tokenmill.models.architectures import bert
from tokenmill.models.config import ModelConfig
from tokenmill.models.fields import Fields


def from_hf(fields: Fields, config: ModelConfig) -> ModelConfig:
    padding = fields.integer("pad_token_id", most=config.vocab_size - 1, least=0, default=1)
    return bert.completed(fields, config, first_position=padding + 1)


ARCHITECTURE = Architecture(
    name="roberta",
    hf_class="XLMRobertaModel",
    hf_others=(
        "RobertaModel",
        f"Roberta{bert.CLASSIFIER}",
        f"XLMRoberta{bert.CLASSIFIER}",
    ),
    build=bert.build,
    from_hf=from_hf,
    gguf_name="",
    activation="gelu",
    is_tied=True,
    has_attention_bias=True,
    model_names={
        **bert.MODEL_NAMES,
        "classifier": ("classifier.out_proj.weight", ""),
        "classifier_bias": ("classifier.out_proj.bias", ""),
        "pooler": ("classifier.dense.weight", ""),
        "pooler_bias": ("classifier.dense.bias", ""),
    },
    layer_names=bert.LAYER_NAMES,
    hf_prefix="roberta.",
    hf_layer_prefix="encoder.layer.",
    unused=lambda config: frozenset(
        (*bert.unused(config), "pooler.dense.weight", "pooler.dense.bias")
    ),
)

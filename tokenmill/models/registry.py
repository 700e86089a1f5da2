"""The architectures. Adding one is adding a file and a line here."""

from tokenmill.errors import UnsupportedModelError
from tokenmill.ir.graph import Graph
from tokenmill.models.architecture import Architecture
from tokenmill.models.architectures import (
    bert,
    distilbert,
    gemma2,
    gemma3,
    granite,
    llama,
    mistral,
    mixtral,
    modernbert,
    nomic_bert,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    roberta,
    smollm3,
)
from tokenmill.models.config import ModelConfig
from tokenmill.models.fields import Fields

ARCHITECTURES: dict[str, Architecture] = {
    module.ARCHITECTURE.name: module.ARCHITECTURE
    for module in (
        *(gemma2, gemma3, granite, llama, mistral, mixtral, olmo2, phi3),
        *(qwen2, qwen3, qwen3_moe, smollm3),
        *(bert, distilbert, modernbert, nomic_bert, roberta),
    )
}


def build_graph(config: ModelConfig) -> Graph:
    """The graph of a model. Raises UnsupportedModelError for an unknown architecture."""
    architecture = ARCHITECTURES.get(config.architecture)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModelError(
            f"architecture {config.architecture!r} is not supported; supported are {known}"
        )
    return architecture.build(config)


def hf_architecture(fields: Fields) -> Architecture:
    """By the class names in config.json."""
    names = fields.values.get("architectures")
    if not isinstance(names, list) or not names:
        raise fields.wrong("architectures", names, "a list of class names")
    known = {name: a for a in ARCHITECTURES.values() for name in a.hf_classes}
    for name in names:
        if isinstance(name, str) and name in known:
            return known[name]
    raise fields.unsupported("architectures", names, " or ".join(known))


def gguf_architecture(fields: Fields) -> Architecture:
    """By `general.architecture`, and by whether there are experts."""
    name = fields.text("general.architecture")
    known = {a.name if a.gguf_name is None else a.gguf_name: a for a in ARCHITECTURES.values()}
    if not name or name not in known:
        raise fields.unsupported("general.architecture", name, " or ".join(filter(None, known)))
    if name == "llama":
        has_experts = bool(fields.values.get("llama.expert_count"))
        return ARCHITECTURES["mixtral" if has_experts else "llama"]
    return known[name]

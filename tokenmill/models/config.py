"""What an architecture needs to know of a model, read from config.json or GGUF metadata."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tokenmill.errors import ModelFileError
from tokenmill.models.fields import Fields

ARCHITECTURES = ("llama", "qwen2")
HF_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}

END_OF_TEXT_TOKENS = frozenset(
    ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>")
)
"""Control tokens that end a text; a GGUF file names only one of those that its model emits."""

_CONTROL_TOKEN = 3  # value of tokenizer.ggml.token_type


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes and options of one decoder-only model; all of them checked.

    `vocab_size` is the number of embedding rows: it may exceed the tokenizer's entries.
    """

    architecture: str  # one of ARCHITECTURES
    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope_theta: float
    context_length: int
    is_tied: bool  # the LM head is the embedding
    has_attention_bias: bool  # on q, k and v
    has_mlp_bias: bool = False
    hidden_act: str = "silu"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()


def config_from_gguf(
    where: str, metadata: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]
) -> ModelConfig:
    """The config of a GGUF file, from its metadata and the shapes of its tensors by GGUF name."""
    fields = Fields(where, metadata)
    architecture = fields.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise fields.unsupported("general.architecture", architecture, " or ".join(ARCHITECTURES))
    p = architecture
    _refuse_gguf_options(fields, p)
    hidden_size = fields.integer(f"{p}.embedding_length", most=2**20)
    vocab_size = _embedding_rows(where, shapes, hidden_size)
    tokens = _gguf_list(fields, "tokenizer.ggml.tokens")
    if len(tokens) > vocab_size:
        raise ModelFileError(
            f"{where}: the tokenizer has {len(tokens)} entries, the embedding {vocab_size} rows"
        )
    num_heads = fields.integer(f"{p}.attention.head_count", most=2**14)
    head_dim = _head_dim(fields, f"{p}.attention.key_length", hidden_size, num_heads)
    fields.require(
        {f"{p}.attention.value_length": (head_dim,), f"{p}.rope.dimension_count": (head_dim,)}
    )
    bos_ids = fields.token_ids("tokenizer.ggml.bos_token_id", vocab_size)
    return _checked(
        where,
        ModelConfig(
            architecture=architecture,
            name=_printable(fields.text("general.name", default=architecture)),
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=fields.integer(f"{p}.block_count", most=10_000),
            num_heads=num_heads,
            num_kv_heads=fields.integer(
                f"{p}.attention.head_count_kv", most=num_heads, default=num_heads
            ),
            head_dim=head_dim,
            intermediate_size=fields.integer(f"{p}.feed_forward_length", most=2**24),
            norm_eps=fields.number(f"{p}.attention.layer_norm_rms_epsilon", most=0.1),
            rope_theta=fields.number(f"{p}.rope.freq_base", most=1e12, default=10_000.0),
            context_length=fields.integer(f"{p}.context_length", most=2**30),
            is_tied="output.weight" not in shapes,
            has_attention_bias=architecture == "qwen2" or "blk.0.attn_q.bias" in shapes,
            bos_id=bos_ids[0] if bos_ids else None,
            eos_ids=_gguf_eos_ids(fields, tokens, vocab_size),
        ),
    )


def _refuse_gguf_options(fields: Fields, p: str) -> None:
    fields.require(
        {
            f"{p}.rope.scaling.type": ("none",),
            f"{p}.rope.scaling.factor": (0, 1),
            f"{p}.rope.scale_linear": (0, 1),
            f"{p}.attention.sliding_window": (0,),
            f"{p}.attention.causal": (True,),
            f"{p}.attention.clamp_kqv": (0,),
            f"{p}.attention.max_alibi_bias": (0,),
            f"{p}.attention.scale": (),
            f"{p}.expert_count": (0,),
            f"{p}.logit_scale": (1,),
            f"{p}.embedding_scale": (1,),
            f"{p}.residual_scale": (1,),
        }
    )


def _embedding_rows(where: str, shapes: Mapping[str, tuple[int, ...]], hidden_size: int) -> int:
    shape = shapes.get("token_embd.weight", ())
    if len(shape) != 2 or shape[1] != hidden_size:
        found = f"has shape {list(shape)}" if shape else "is missing"
        raise ModelFileError(
            f"{where}: token_embd.weight {found}, expected [vocabulary, {hidden_size}]"
        )
    return shape[0]


def _gguf_list(fields: Fields, key: str) -> list[object]:
    value = fields.values.get(key, [])
    if not isinstance(value, list):
        raise fields.wrong(key, value, "an array")
    return value


def _gguf_eos_ids(fields: Fields, tokens: list[object], vocab_size: int) -> tuple[int, ...]:
    named = [
        i
        for key in ("eos_token_id", "eot_token_id", "eom_token_id")
        for i in fields.token_ids(f"tokenizer.ggml.{key}", vocab_size)
    ]
    types = _gguf_list(fields, "tokenizer.ggml.token_type")
    control = (i for i, kind in enumerate(types[: len(tokens)]) if kind == _CONTROL_TOKEN)
    return _unique([*named, *(i for i in control if tokens[i] in END_OF_TEXT_TOKENS)])


def config_from_hf(
    where: str, name: str, config: Mapping[str, object], generation: Mapping[str, object]
) -> ModelConfig:
    """The config of a Hugging Face folder, from config.json and generation_config.json ({})."""
    fields = Fields(where, config)
    architecture = _hf_architecture(fields)
    _refuse_hf_options(fields, architecture)
    vocab_size = fields.integer("vocab_size", most=2**24)
    hidden_size = fields.integer("hidden_size", most=2**20)
    num_heads = fields.integer("num_attention_heads", most=2**14)
    special = Fields(where, {**_token_ids_only(config), **_token_ids_only(generation)})
    bos_ids = special.token_ids("bos_token_id", vocab_size)
    return _checked(
        where,
        ModelConfig(
            architecture=architecture,
            name=name,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=fields.integer("num_hidden_layers", most=10_000),
            num_heads=num_heads,
            num_kv_heads=fields.integer("num_key_value_heads", most=num_heads, default=num_heads),
            head_dim=_head_dim(fields, "head_dim", hidden_size, num_heads),
            intermediate_size=fields.integer("intermediate_size", most=2**24),
            norm_eps=fields.number("rms_norm_eps", most=0.1, default=1e-6),
            rope_theta=_hf_rope_theta(fields),
            context_length=fields.integer("max_position_embeddings", most=2**30),
            is_tied=fields.flag("tie_word_embeddings", default=False),
            has_attention_bias=architecture == "qwen2",
            bos_id=bos_ids[0] if bos_ids else None,
            eos_ids=_unique(special.token_ids("eos_token_id", vocab_size)),
        ),
    )


def _hf_architecture(fields: Fields) -> str:
    value = fields.values.get("architectures")
    if not isinstance(value, list) or not value:
        raise fields.wrong("architectures", value, "a list of class names")
    for name in value:
        if isinstance(name, str) and name in HF_ARCHITECTURES:
            return HF_ARCHITECTURES[name]
    raise fields.unsupported("architectures", value, " or ".join(HF_ARCHITECTURES))


def _refuse_hf_options(fields: Fields, architecture: str) -> None:
    fields.require(
        {
            "hidden_act": ("silu",),
            "attention_bias": (architecture == "qwen2",),
            "mlp_bias": (False,),
            "use_sliding_window": (False,),
            "partial_rotary_factor": (1,),
            "quantization_config": (),
        }
    )
    if architecture == "llama":  # qwen2 configs name a window even when use_sliding_window is off
        fields.require({"sliding_window": ()})
    layer_types = fields.values.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(t != "full_attention" for t in layer_types)
    ):
        raise fields.unsupported("layer_types", layer_types, "'full_attention' in every layer")


def _hf_rope_theta(fields: Fields) -> float:
    """`rope_theta`, or the same inside `rope_parameters`, where newer configs keep it."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = fields.values.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise fields.wrong(key, rope, "an object")
        inner = Fields(f"{fields.where}: {key}", rope)
        inner.require(
            {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1,)}
        )
        if "rope_theta" in rope:
            return inner.number("rope_theta", most=1e12)
    return fields.number("rope_theta", most=1e12, default=10_000.0)


def _token_ids_only(config: Mapping[str, object]) -> dict[str, object]:
    keys = ("bos_token_id", "eos_token_id")
    return {key: config[key] for key in keys if config.get(key) is not None}


def _head_dim(fields: Fields, key: str, hidden_size: int, num_heads: int) -> int:
    if fields.values.get(key) is None and hidden_size % num_heads:
        raise ModelFileError(
            f"{fields.where}: hidden size {hidden_size} does not divide by {num_heads} heads"
        )
    return fields.integer(key, most=2**12, least=2, default=hidden_size // num_heads)


def _checked(where: str, config: ModelConfig) -> ModelConfig:
    if config.num_heads % config.num_kv_heads:
        raise ModelFileError(
            f"{where}: {config.num_heads} heads do not divide by {config.num_kv_heads} KV heads"
        )
    if config.head_dim % 2:
        raise ModelFileError(f"{where}: head size {config.head_dim} is odd; rotary needs pairs")
    return config


def _printable(name: str) -> str:
    """A stranger's text, made safe to show on a terminal."""
    return "".join(c if c.isprintable() else " " for c in name[:200])


def _unique(ids: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(ids))

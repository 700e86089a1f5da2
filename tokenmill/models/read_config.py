"""Reads a ModelConfig out of config.json or GGUF metadata.

Here is what all architectures share; each completes it with what is its own, and refuses what it
cannot compute with (`Architecture.from_hf`, `from_gguf`).
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from tokenmill.errors import ModelFileError
from tokenmill.ir.order import F32Array
from tokenmill.models.config import Encoder, LayerKind, ModelConfig, Rope
from tokenmill.models.fields import Fields
from tokenmill.models.registry import gguf_architecture, hf_architecture
from tokenmill.models.rope_scaling import Head, divided_rope, gguf_rope, partial_rope

END_OF_TEXT_TOKENS = frozenset(
    (
        *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>"),
        *("<|end|>", "<end_of_turn>", "<|end_of_role|>"),
    )
)
"""Control tokens that end a text; a GGUF file names only one of those that its model emits."""

ROPE_DIVISORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors of GGUF files that belong to the config: what each pair's frequency is divided by."""

_CONTROL_TOKEN = 3  # value of tokenizer.ggml.token_type


def config_from_gguf(
    where: str,
    metadata: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    divisors: Mapping[str, F32Array] | None = None,
) -> ModelConfig:
    """The config of a GGUF file, from its metadata and the shapes of its tensors by GGUF name.

    `divisors` is the content of those of ROPE_DIVISORS that the file has.
    """
    fields = Fields(where, metadata)
    architecture = gguf_architecture(fields)
    p = fields.text("general.architecture")
    _refuse_gguf_options(fields, p, architecture.gguf_reads)
    hidden_size = fields.integer(f"{p}.embedding_length", most=2**20)
    vocab_size = _embedding_rows(where, shapes, hidden_size)
    tokens = _gguf_list(fields, "tokenizer.ggml.tokens")
    if len(tokens) > vocab_size:
        raise ModelFileError(
            f"{where}: the tokenizer has {len(tokens)} entries, the embedding {vocab_size} rows"
        )
    num_heads = fields.integer(f"{p}.attention.head_count", most=2**14)
    head_dim = _head_dim(fields, f"{p}.attention.key_length", hidden_size, num_heads)
    fields.require({f"{p}.attention.value_length": (head_dim,)})
    if not architecture.may_turn_partly:
        fields.require({f"{p}.rope.dimension_count": (head_dim,)})
    bos_ids = fields.token_ids("tokenizer.ggml.bos_token_id", vocab_size)
    context_length = fields.integer(f"{p}.context_length", most=2**30)
    head = Head(
        dim=fields.integer(f"{p}.rope.dimension_count", most=head_dim, default=head_dim),
        theta=fields.number(f"{p}.rope.freq_base", most=1e12, default=10_000.0),
        context_length=context_length,
    )
    rope = gguf_rope(fields, p, head)
    if divisors:
        rope = _divided(where, head, divisors)
    rope = partial_rope(rope, head, head_dim)
    key = f"{p}.rope.scaling.original_context_length"
    trained = fields.integer(key, most=2**30, default=context_length) if rope.beyond else 0
    num_layers = fields.integer(f"{p}.block_count", most=10_000)
    config = ModelConfig(
        architecture=architecture.name,
        name=_printable(fields.text("general.name", default=architecture.name)),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=(LayerKind(rope=rope),) * num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer(
            f"{p}.attention.head_count_kv", most=num_heads, default=num_heads
        ),
        head_dim=head_dim,
        rotary_dim=head.dim,
        intermediate_size=fields.integer(f"{p}.feed_forward_length", most=2**24),
        norm_eps=fields.number(f"{p}.{architecture.gguf_norm_eps}", most=0.1),
        context_length=min(context_length, trained or context_length),
        long_context_length=context_length if rope.beyond else 0,
        is_tied="output.weight" not in shapes,
        has_attention_bias=architecture.has_attention_bias or "blk.0.attn_q.bias" in shapes,
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=_gguf_eos_ids(fields, tokens, vocab_size),
    )
    return architecture.from_gguf(fields, _checked(where, config))


_GGUF_OPTIONS: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "expert_count": (0,),
    "logit_scale": (1,),
    "embedding_scale": (1,),
    "residual_scale": (1,),
}
"""Metadata that changes what a model computes, and the values that change nothing."""


def _refuse_gguf_options(fields: Fields, p: str, reads: Collection[str]) -> None:
    """Refuse what the architecture does not read itself."""
    fields.require({f"{p}.{k}": v for k, v in _GGUF_OPTIONS.items() if k not in reads})


def _divided(where: str, head: Head, divisors: Mapping[str, F32Array]) -> Rope:
    for name, values in divisors.items():
        if values.shape != (head.dim // 2,) or not (values > 0).all():
            raise ModelFileError(f"{where}: {name} must hold {head.dim // 2} numbers above 0")
    plain, short, long = map(divisors.get, ROPE_DIVISORS)
    near = short if plain is None else plain
    if near is None:
        raise ModelFileError(f"{where}: {ROPE_DIVISORS[2]} stands without {ROPE_DIVISORS[1]}")
    return divided_rope(head, near, long if plain is None else None)


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
    architecture = hf_architecture(Fields(where, config))
    own = {key: config[name] for key, name in architecture.hf_keys.items() if name in config}
    fields = Fields(where, {**config, **own})
    fields.require(
        {
            "hidden_act": (architecture.activation,),
            "hidden_activation": (architecture.activation,),
            "attention_bias": (architecture.has_attention_bias,),
            "mlp_bias": (False,),
        }
    )
    vocab_size = fields.integer("vocab_size", most=2**24)
    hidden_size = fields.integer("hidden_size", most=2**20)
    num_heads = fields.integer("num_attention_heads", most=2**14)
    special = Fields(where, {**_token_ids_only(config), **_token_ids_only(generation)})
    bos_ids = special.token_ids("bos_token_id", vocab_size)
    num_layers = fields.integer("num_hidden_layers", most=10_000)
    context_length = fields.integer("max_position_embeddings", most=2**30)
    head_dim = _head_dim(fields, "head_dim", hidden_size, num_heads)
    head = Head(
        dim=_hf_rotary_dim(fields, head_dim, architecture.may_turn_partly),
        theta=architecture.rope_theta,
        context_length=context_length,
    )
    rope = partial_rope(architecture.hf_rope(fields, head), head, head_dim)
    shared = ModelConfig(
        architecture=architecture.name,
        name=name,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=(LayerKind(rope=rope),) * num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", most=num_heads, default=num_heads),
        head_dim=head_dim,
        rotary_dim=head.dim,
        intermediate_size=fields.integer("intermediate_size", most=2**24),
        norm_eps=fields.number("rms_norm_eps", most=0.1, default=1e-6),
        context_length=min(context_length, rope.num_positions or context_length),
        long_context_length=context_length if rope.beyond else 0,
        is_tied=fields.flag("tie_word_embeddings", default=architecture.is_tied),
        has_attention_bias=architecture.has_attention_bias,
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=_unique(special.token_ids("eos_token_id", vocab_size)),
    )
    complete = architecture.from_hf(fields, _checked(where, shared))
    if complete.encoder is None and not fields.flag("is_causal", default=True):
        return replace(complete, has_head=False, encoder=Encoder())
    return complete


def _hf_rotary_dim(fields: Fields, head_dim: int, may_be_less: bool) -> int:
    """Dimensions of a head that turn, by `partial_rotary_factor`, wherever that stands."""
    places = [fields]
    for key in ("rope_scaling", "rope_parameters"):
        inner = fields.values.get(key)
        if isinstance(inner, dict):
            places.append(Fields(f"{fields.where}: {key}", inner))
    if not may_be_less:
        for place in places:
            place.require({"partial_rotary_factor": (1,)})
        return head_dim
    shares = [place.number("partial_rotary_factor", most=1, default=1.0) for place in places]
    return int(head_dim * min(shares))


def _token_ids_only(config: Mapping[str, object]) -> dict[str, object]:
    keys = ("bos_token_id", "eos_token_id")
    return {key: config[key] for key in keys if config.get(key) is not None}


def _head_dim(fields: Fields, key: str, hidden_size: int, num_heads: int) -> int:
    if fields.values.get(key) is None and hidden_size % num_heads:
        raise ModelFileError(
            f"{fields.where}: hidden size {hidden_size} does not divide by {num_heads} heads, and "
            f"{key} gives no other size"
        )
    return fields.integer(key, most=2**12, least=2, default=hidden_size // num_heads)


def _checked(where: str, config: ModelConfig) -> ModelConfig:
    if config.num_heads % config.num_kv_heads:
        raise ModelFileError(
            f"{where}: num_key_value_heads (attention.head_count_kv) is {config.num_kv_heads}, "
            f"which does not divide the {config.num_heads} heads"
        )
    if config.head_dim % 2:
        raise ModelFileError(f"{where}: head size {config.head_dim} is odd; rotary needs pairs")
    if config.rotary_dim % 2 or not config.rotary_dim:
        raise ModelFileError(f"{where}: {config.rotary_dim} dimensions turn; rotary needs pairs")
    return config


def _printable(name: str) -> str:
    """A stranger's text, made safe to show on a terminal."""
    return "".join(c if c.isprintable() else " " for c in name[:200])


def _unique(ids: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(ids))

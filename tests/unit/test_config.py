"""Model configs out of config.json and GGUF metadata."""

from math import log
from pathlib import Path

import pytest
from model_files import (
    HEAD_DIM,
    HEADS,
    HF_CONFIG,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    VOCAB,
    gguf_metadata,
    random_weights,
    write_gguf,
    write_hf_folder,
)

from tokenmill.errors import ModelFileError, TokenmillError, UnsupportedModelError
from tokenmill.models.checkpoint import open_checkpoint
from tokenmill.models.config import LayerKind, ModelConfig, Rope
from tokenmill.models.read_config import config_from_gguf, config_from_hf

TINY = ModelConfig(
    architecture="llama",
    name="tiny",
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    layers=(LayerKind(rope=Rope(theta=10000.0)),) * LAYERS,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    rotary_dim=HEAD_DIM,
    intermediate_size=INNER,
    norm_eps=1e-5,
    context_length=128,
    is_tied=False,
    has_attention_bias=False,
    bos_id=1,
    eos_ids=(2,),
)
SHAPES = {"token_embd.weight": (VOCAB, HIDDEN), "output.weight": (VOCAB, HIDDEN)}


def from_hf(changes: dict[str, object], generation: dict[str, object] | None = None) -> ModelConfig:
    return config_from_hf("m", "tiny", HF_CONFIG | changes, generation or {})


def from_gguf(changes: dict[str, object], architecture: str = "llama") -> ModelConfig:
    metadata = {"general.architecture": architecture} | gguf_metadata(architecture) | changes
    return config_from_gguf("m.gguf", metadata, SHAPES)


def rope_of(config: ModelConfig) -> Rope:
    """That of the first layer."""
    rope = config.layers[0].rope
    assert rope is not None
    return rope


def test_both_kinds_of_file_give_the_same_config(tmp_path: Path) -> None:
    weights = random_weights()
    folder = open_checkpoint(write_hf_folder(tmp_path / "tiny", weights))
    assert folder.config == TINY
    file = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights))
    assert file.config.norm_eps == pytest.approx(1e-5)  # float32 in the file
    same = {"norm_eps": TINY.norm_eps, "eos_ids": TINY.eos_ids}
    assert ModelConfig(**{**vars(file.config), **same}) == TINY


def test_qwen2_has_bias_and_tying_follows_the_file() -> None:
    qwen = from_hf({"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True})
    assert (qwen.architecture, qwen.has_attention_bias, qwen.is_tied) == ("qwen2", True, True)
    metadata = {"general.architecture": "qwen2"} | gguf_metadata("qwen2")
    tied = config_from_gguf("m", metadata, {"token_embd.weight": (VOCAB, HIDDEN)})
    assert (tied.architecture, tied.has_attention_bias, tied.is_tied) == ("qwen2", True, True)


def test_vocabulary_is_the_embedding_even_if_the_tokenizer_has_fewer_entries() -> None:
    assert len(gguf_metadata("llama")["tokenizer.ggml.tokens"]) < VOCAB
    assert from_gguf({}).vocab_size == VOCAB
    with pytest.raises(ModelFileError, match=f"tokenizer has 41 entries, the embedding {VOCAB}"):
        from_gguf({"tokenizer.ggml.tokens": ["a"] * 41})


def test_every_token_that_ends_a_text_is_found() -> None:
    assert from_gguf({}).eos_ids == (2, 0)
    assert from_gguf({"tokenizer.ggml.eot_token_id": 3}).eos_ids == (2, 3, 0)
    assert from_gguf({"tokenizer.ggml.token_type": [1] * 5}).eos_ids == (2,)
    assert from_hf({}, {"eos_token_id": [5, 2, 5]}).eos_ids == (5, 2)
    assert from_hf({"eos_token_id": None}).eos_ids == ()
    assert from_gguf({"tokenizer.ggml.bos_token_id": 2**32 - 1}).bos_id is None


def test_defaults_of_the_architectures() -> None:
    config = from_hf({"num_key_value_heads": None, "rope_theta": None, "rms_norm_eps": None})
    assert (config.num_kv_heads, rope_of(config).theta, config.norm_eps) == (HEADS, 1e4, 1e-6)
    wide = from_hf({"head_dim": 32})
    assert wide.head_dim == 32


def test_name_is_safe_to_show() -> None:
    assert from_gguf({"general.name": "a\x1b[31m\nb" + "c" * 999}).name == "a [31m b" + "c" * 192


def test_rope_theta_where_newer_configs_keep_it() -> None:
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    assert rope_of(from_hf({"rope_theta": None, "rope_parameters": rope})).theta == 5e5


YARN = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("changes", "magnitude"),
    [
        ({}, 0.1 * log(40) + 1),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 0.5}, (0.0707 * log(40) + 1) / (0.05 * log(40) + 1)),
        ({"mscale": 0.707}, 0.1 * log(40) + 1),  # as transformers has it
        ({"mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": 1.25}, 1.25),
    ],
)
def test_yarn_s_magnitude(changes: dict[str, object], magnitude: float) -> None:
    found = rope_of(from_hf({"rope_scaling": YARN | changes}))
    assert found.magnitude == pytest.approx(magnitude)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "Mamba.*LlamaForCausalLM or .*Qwen2ForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported is 'silu'"),
        ({"attention_bias": True}, "attention_bias is True, supported is False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type is 'dynamic', supported is 'defau"),
        ({"rope_scaling": {"type": "ntk"}}, "type is 'ntk', supported is .* or 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_unsupported_hf_option_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        from_hf(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "architectures is None"),
        ({"architectures": "LlamaForCausalLM"}, "expected a list"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected an integer"),
        ({"hidden_size": 65}, "hidden size 65 does not divide by 4 heads"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 3}, "is 3, which does not divide the 4 heads"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000"),
        ({"head_dim": 15}, "head size 15 is odd"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_scaling": 2}, "rope_scaling is 2, expected an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0, expected a number above"),
        ({"vocab_size": 2**40}, "vocab_size is"),
        ({"eos_token_id": VOCAB}, f"eos_token_id is {VOCAB}, expected a token id below {VOCAB}"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
    ],
)
def test_absurd_hf_value_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        from_hf(changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"general.architecture": "mamba"}, UnsupportedModelError, "'mamba'.*llama or .*qwen2"),
        ({"general.architecture": None}, ModelFileError, "general.architecture is missing"),
        ({"general.architecture": 7}, ModelFileError, "expected a string"),
        ({"llama.attention.clamp_kqv": 8}, UnsupportedModelError, "clamp_kqv is 8"),
        ({"llama.rope.scaling.type": "ntk"}, UnsupportedModelError, "is 'ntk', supported is"),
        ({"llama.rope.dimension_count": 8}, UnsupportedModelError, "is 8, supported is 16"),
        ({"llama.attention.head_count": [4, 2]}, UnsupportedModelError, "one value for all"),
        ({"llama.attention.scale": 0.5}, UnsupportedModelError, "attention.scale is 0.5"),
        ({"llama.block_count": 0}, ModelFileError, "llama.block_count is 0"),
        ({"llama.block_count": None}, ModelFileError, "llama.block_count is missing"),
        ({"llama.block_count": 2.0}, ModelFileError, "expected an integer"),
        ({"llama.embedding_length": 63}, ModelFileError, r"has shape \[40, 64\], expected"),
        ({"llama.attention.head_count": 3}, ModelFileError, "does not divide by 3 heads"),
        ({"tokenizer.ggml.tokens": "abc"}, ModelFileError, "expected an array"),
        ({"tokenizer.ggml.eos_token_id": 40}, ModelFileError, "is 40, expected a token id"),
    ],
)
def test_gguf_value_is_named(
    changes: dict[str, object], error: type[TokenmillError], message: str
) -> None:
    with pytest.raises(error, match=message):
        from_gguf(changes)

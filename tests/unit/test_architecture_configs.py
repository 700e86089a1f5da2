"""Each architecture's own part of a config, and what it refuses by name."""

from pathlib import Path

import numpy as np
import pytest
from model_files import (
    HEAD_DIM,
    HF_CONFIG,
    HIDDEN,
    INNER,
    VOCAB,
    gguf_metadata,
    random_weights,
    write_hf_folder,
)
from safetensors.numpy import save_file

from tokenmill.errors import ModelFileError, TokenmillError, UnsupportedModelError
from tokenmill.ir.verify import verify
from tokenmill.models.checkpoint import open_checkpoint
from tokenmill.models.config import Encoder, Experts, LayerKind, ModelConfig, Rope
from tokenmill.models.read_config import config_from_gguf, config_from_hf
from tokenmill.models.registry import ARCHITECTURES, build_graph
from tokenmill.passes.return_hidden import return_hidden

SHAPES = {"token_embd.weight": (VOCAB, HIDDEN), "output.weight": (VOCAB, HIDDEN)}
GEMMA = {"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh"}

EXPERTS: dict[str, object] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 3,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
}


def from_hf(architecture: str, changes: dict[str, object]) -> ModelConfig:
    named = {"architectures": [f"{architecture}ForCausalLM"]}
    return config_from_hf("m", "tiny", {**HF_CONFIG, **named, **changes}, {})


def from_gguf(architecture: str, changes: dict[str, object]) -> ModelConfig:
    metadata = {"general.architecture": architecture} | gguf_metadata(architecture) | changes
    return config_from_gguf("m.gguf", metadata, SHAPES)


def windows(config: ModelConfig) -> list[int]:
    return [kind.window for kind in config.layers]


def test_windows_are_those_of_the_config() -> None:
    assert windows(from_hf("Mistral", {"sliding_window": 40})) == [40, 40]
    assert windows(from_hf("Mistral", {"sliding_window": None})) == [0, 0]
    assert windows(from_hf("Phi3", {"sliding_window": 40})) == [40, 40]
    assert windows(from_gguf("llama", {"llama.attention.sliding_window": 40})) == [40, 40]
    used = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}
    assert windows(from_hf("Qwen3", used)) == [0, 40]
    assert windows(from_hf("Qwen3", used | {"use_sliding_window": False})) == [0, 0]
    given = {"layer_types": ["sliding_attention", "full_attention"]}
    assert windows(from_hf("Qwen3", used | given)) == [40, 0]
    assert windows(from_hf("Gemma2", GEMMA | {"sliding_window": 40})) == [40, 0]


def test_gemma_3_has_two_kinds_of_layers_in_old_and_new_files() -> None:
    old = {"sliding_window": 40, "sliding_window_pattern": 2, "rope_local_base_freq": 5e3}
    found = from_hf("Gemma3", GEMMA | old | {"rope_theta": 1e6})
    kinds = (LayerKind(rope=Rope(theta=5e3), window=40), LayerKind(rope=Rope(theta=1e6)))
    assert found.layers == kinds
    new = {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 40,
        "rope_theta": None,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    }
    assert from_hf("Gemma3", GEMMA | new).layers == kinds


def test_scores_of_the_largest_gemma_follow_its_hidden_size() -> None:
    sizes = {"gemma3.attention.sliding_window": 40, "gemma3.attention.key_length": 32}
    assert from_gguf("gemma3", sizes).score_scale == 32**-0.5
    large = from_gguf("gemma3", sizes | {"gemma3.block_count": 62})
    assert large.score_scale == HEAD_DIM**-0.5


def test_smollm_3_turns_no_head_in_every_fourth_layer() -> None:
    ropes = [k.rope is not None for k in from_hf("SmolLM3", {"num_hidden_layers": 5}).layers]
    assert ropes == [True, True, True, False, True]
    named = from_hf("SmolLM3", {"no_rope_layers": [0, 1]})
    assert [k.rope is not None for k in named.layers] == [False, True]
    assert from_gguf("smollm3", {"smollm3.block_count": 4}).layers[3].rope is None


def test_experts_may_be_in_some_layers_only() -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    found = from_hf("Qwen3Moe", sizes | {"mlp_only_layers": [0]})
    assert [kind.is_dense for kind in found.layers] == [True, False]
    names = build_graph(found).weights()
    assert names["layers.0.gate"].shape == (INNER, HIDDEN)
    assert names["layers.1.expert_down"].shape == (4 * HIDDEN, 8)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("Llama", {"sliding_window": 40}, "sliding_window is 40, supported is absence"),
        ("Mistral", {"hidden_act": "gelu"}, "hidden_act is 'gelu', supported is 'silu'"),
        ("Mistral", {"layer_types": ["sliding_attention"]}, "layer_types is"),
        ("Qwen3", {"attention_bias": True}, "attention_bias is True, supported is False"),
        ("Qwen3", {"layer_types": ["full_attention", "chunked"]}, "supported is 'full_attention'"),
        ("Gemma2", GEMMA | {"layer_types": ["full_attention", "chunked"]}, "and 'sliding_att"),
        ("Gemma2", GEMMA | {"hidden_act": "silu"}, "supported is 'gelu_pytorch_tanh'"),
        ("Gemma2", GEMMA | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Phi3", {"rope_scaling": {"type": "dynamic"}}, "type is 'dynamic', supported is"),
        ("SmolLM3", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("Granite", {"mlp_bias": True}, "mlp_bias is True, supported is False"),
        ("Mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_an_unsupported_option_is_named(
    architecture: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        from_hf(architecture, changes)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("Gemma2", GEMMA | {"layer_types": ["full_attention"]}, "expected 2 entries, one a layer"),
        ("SmolLM3", {"no_rope_layers": [1]}, "no_rope_layers is .*expected 2 entries of 0 or 1"),
        ("SmolLM3", {"no_rope_layers": [1, 2]}, "no_rope_layers is"),
        ("Granite", {"logits_scaling": 0}, "logits_scaling is 0, expected a number above 0"),
        ("Mixtral", {"num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok is 3"),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2}, "moe_intermediate_size is miss"),
        ("Phi3", {"partial_rotary_factor": 0.07}, "1 dimensions turn"),
        (
            "Phi3",
            {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 64}},
            "short_factor is missing",
        ),
    ],
)
def test_an_absurd_value_is_named(
    architecture: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelFileError, match=message):
        from_hf(architecture, changes)


@pytest.mark.parametrize(
    ("architecture", "changes", "error", "message"),
    [
        ("qwen3", {"qwen3.expert_count": 8}, UnsupportedModelError, "qwen3.expert_count is 8"),
        ("olmo2", {"olmo2.attention.scale": 0.1}, UnsupportedModelError, "attention.scale is 0.1"),
        (
            "gemma3",
            {"gemma3.attention.sliding_window_pattern": 4},
            UnsupportedModelError,
            "sliding_window_pattern is 4, supported is 6",
        ),
        (
            "llama",
            {"llama.expert_count": 4, "llama.expert_used_count": 2, "llama.expert_gating_func": 2},
            UnsupportedModelError,
            "expert_gating_func is 2, supported is 1",
        ),
        ("qwen3moe", {"qwen3moe.expert_count": None}, ModelFileError, "expert_count is missing"),
        ("llama", {"llama.expert_count": 4}, ModelFileError, "llama.expert_used_count is missing"),
    ],
)
def test_an_unsupported_gguf_value_is_named(
    architecture: str, changes: dict[str, object], error: type[TokenmillError], message: str
) -> None:
    with pytest.raises(error, match=message):
        from_gguf(architecture, changes)


def test_divisors_of_a_gguf_file_must_fit_the_heads() -> None:
    metadata = {"general.architecture": "llama"} | gguf_metadata("llama")
    with pytest.raises(ModelFileError, match=f"rope_freqs.weight .*must hold {HEAD_DIM // 2}"):
        config_from_gguf("m", metadata, SHAPES, {"rope_freqs.weight": np.ones(3, np.float32)})
    long = {"rope_factors_long.weight": np.ones(HEAD_DIM // 2, np.float32)}
    with pytest.raises(ModelFileError, match=r"rope_factors_long\.weight stands without"):
        config_from_gguf("m", metadata, SHAPES, long)


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        (
            {"architectures": ["Phi3ForCausalLM"]},
            {"mlp.gate_up_proj.weight": (2 * INNER + 1, HIDDEN)},
            rf"layers\.0\.gate_up has shape .*expected {2 * INNER} rows",
        ),
        (
            EXPERTS,
            {f"mlp.experts.{e}.up_proj.weight": (8, HIDDEN) for e in (0, 2)},
            r"layers\.0\.expert_up takes 3 experts .*found are 2",
        ),
        (
            EXPERTS,
            {f"mlp.experts.{e}.up_proj.weight": (8, HIDDEN + e // 2) for e in range(3)},
            r"layers\.0\.expert_up takes 3 experts of one shape .*found are 3 in 2",
        ),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(
    changes: dict[str, object],
    tensors: dict[str, tuple[int, int]],
    message: str,
    tmp_path: Path,
) -> None:
    folder = write_hf_folder(tmp_path, random_weights(), changes=changes)
    arrays = {f"model.layers.0.{n}": np.zeros(s, np.float32) for n, s in tensors.items()}
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(ModelFileError, match=message):
        open_checkpoint(folder)


BERT: dict[str, object] = {
    "architectures": ["BertModel"],
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 3,
    "pad_token_id": 1,
}


def encoder(**changes: object) -> ModelConfig:
    return config_from_hf("m", "tiny", {**HF_CONFIG, **BERT, **changes}, {})


def test_encoders_place_their_tokens() -> None:
    config = encoder()
    assert config.encoder == Encoder(num_positions=128, first_position=0, num_segments=3)
    assert (config.context_length, config.norm_eps) == (128, 1e-12)
    assert [kind.rope for kind in config.layers] == [None, None]
    config = encoder(architectures=["RobertaForSequenceClassification"], id2label={"0": "x"})
    assert config.encoder == Encoder(
        num_positions=128, first_position=2, num_segments=3, num_labels=1
    )
    assert config.context_length == 126


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu', supported is 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True, supported is False"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        (
            {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}},
            "supported is one label, whose logit is a score",
        ),
        ({"architectures": ["BertForMaskedLM"]}, r"architectures is \['BertForMaskedLM'\]"),
    ],
)
def test_what_encoders_refuse(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TokenmillError, match=message):
        encoder(**changes)


@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if "Causal" in a.hf_class])
def test_every_decoder_can_give_hidden_states(name: str) -> None:
    config = ModelConfig(
        architecture=name,
        name=name,
        vocab_size=VOCAB,
        hidden_size=64,
        layers=(LayerKind(),) * 2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rotary_dim=16,
        intermediate_size=96,
        norm_eps=1e-6,
        context_length=128,
        is_tied=True,
        experts=Experts(count=4, per_token=2, size=24, is_renormalized=True),
    )
    graph = return_hidden(build_graph(config))
    verify(graph)
    assert str(graph.main.values[graph.main.returns[-1]]) == "f32[E,64]"

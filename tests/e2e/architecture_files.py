"""Small random models of transformers, written to disk as a folder and as a GGUF file.

Names of tensors in GGUF files come from the `gguf` package, which is llama.cpp's own list; what its
converter does beyond renaming (pairs interleaved, norms completed) is done here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType

VOCAB = 131
INTERLEAVED = (MODEL_ARCH.LLAMA, MODEL_ARCH.GRANITE, MODEL_ARCH.SMOLLM3)
ONE_PLUS_NORM = (MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3)

Writes = Callable[[GGUFWriter, Any], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A class of transformers, the config that it is tried with, and what its GGUF file is."""

    family: str  # of the classes: <family>Config, <family>ForCausalLM
    options: Mapping[str, object]
    arch: MODEL_ARCH
    writes: Writes = lambda writer, config: None
    config_class: str = ""  # where the config's class is called otherwise


def make_model(case: Case) -> Any:
    """A model with random weights, of a size at which every part matters."""
    sizes: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }
    config_class = getattr(transformers, case.config_class or f"{case.family}Config")
    config = config_class(**(sizes | dict(case.options)))
    model = getattr(transformers, f"{case.family}ForCausalLM")(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
            else:
                is_one = "norm" in name and case.arch not in ONE_PLUS_NORM
                parameter.normal_(float(is_one), 0.4)
    return model


def write_gguf(path: Path, model: Any, case: Case) -> Path:
    """The model as llama.cpp's converter writes it, in float32, with a vocabulary of its own."""
    config = model.config
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[case.arch])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    case.writes(writer, config)
    names = gguf.get_tensor_name_map(case.arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for suffix, array in converted(name, tensor.numpy().astype(np.float32), case, config):
            stem, _, kind = suffix.rpartition(".")
            target = names.get_name(stem)
            assert target is not None, suffix
            writer.add_tensor(f"{target}.{kind}", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def head_dim(config: Any) -> int:
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def converted(
    name: str, array: np.ndarray, case: Case, config: Any
) -> list[tuple[str, np.ndarray]]:
    """The tensors that a parameter becomes, under Hugging Face's names."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2]
    if case.arch in INTERLEAVED and part in heads:
        pairs = array.reshape(heads[part], 2, -1, *array.shape[1:])
        array = pairs.swapaxes(1, 2).reshape(array.shape)
    if case.arch in ONE_PLUS_NORM and part.endswith("norm"):
        array = array + 1
    if name.endswith("experts.gate_up_proj"):
        halves = np.split(array, 2, axis=1)
        kinds = ("gate", "up")
        return [
            (name.replace("gate_up_proj", f"{k}_proj.weight"), h)
            for k, h in zip(kinds, halves, strict=True)
        ]
    return [(name + ".weight" if name.endswith("experts.down_proj") else name, array)]


def linear(writer: GGUFWriter, config: Any) -> None:
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def yarn(writer: GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def yarn_scaled(writer: GGUFWriter, config: Any) -> None:
    """llama.cpp multiplies by 0.1 ln(factor) + 1 itself, so a file says what is beside that."""
    yarn(writer, config)
    rope = config.rope_parameters
    terms = [0.1 * rope.get(key, 0) * np.log(rope["factor"]) + 1 for key in MSCALES]
    writer.add_rope_scaling_attn_factors(terms[0] / terms[1] / (0.1 * np.log(rope["factor"]) + 1))


def llama3(writer: GGUFWriter, config: Any) -> None:
    """The converter stores how far each frequency is from the unscaled one."""
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    exponents = np.arange(0, head_dim(config), 2) / head_dim(config)
    plain = config.rope_parameters["rope_theta"] ** -exponents
    writer.add_tensor("rope_freqs.weight", (plain / rotary.inv_freq.numpy()).astype(np.float32))


def window(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window or 0)


def gemma2(writer: GGUFWriter, config: Any) -> None:
    window(writer, config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def gemma3(writer: GGUFWriter, config: Any) -> None:
    window(writer, config)
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(config.rope_parameters["full_attention"]["factor"])
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def granite(writer: GGUFWriter, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def phi3(writer: GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    writer.add_rope_dimension_count(int(head_dim(config) * rope["partial_rotary_factor"]))
    writer.add_sliding_window(config.sliding_window or 0)
    if rope["rope_type"] == "longrope":
        trained = config.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(trained)
        grown = np.log(config.max_position_embeddings / trained) / np.log(trained)
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + grown)))
        for kind in ("long", "short"):
            factors = np.array(rope[f"{kind}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{kind}.weight", factors)


def experts(writer: GGUFWriter, config: Any) -> None:
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}
MSCALES = ("mscale", "mscale_all_dim")
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 2.0, 3.0, 4.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
    "partial_rotary_factor": 0.75,
}

CASES: dict[str, Case] = {
    "llama 3": Case(
        family="Llama",
        options={"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
        arch=MODEL_ARCH.LLAMA,
        writes=llama3,
    ),
    "llama, linear": Case(
        family="Llama",
        options={"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
        arch=MODEL_ARCH.LLAMA,
        writes=linear,
    ),
    "qwen2, yarn": Case(
        family="Qwen2", options={"rope_parameters": YARN_ROPE}, arch=MODEL_ARCH.QWEN2, writes=yarn
    ),
    "llama, yarn of DeepSeek": Case(
        family="Llama",
        options={"rope_parameters": YARN_ROPE | {"mscale": 1.3, "mscale_all_dim": 0.6}},
        arch=MODEL_ARCH.LLAMA,
        writes=yarn_scaled,
    ),
    "mistral": Case(
        family="Mistral", options={"sliding_window": 37}, arch=MODEL_ARCH.LLAMA, writes=window
    ),
    "qwen3": Case(family="Qwen3", options={"head_dim": 20}, arch=MODEL_ARCH.QWEN3),
    "qwen3, wide": Case(
        family="Qwen3",
        options={"head_dim": 64, "num_key_value_heads": 1, "tie_word_embeddings": True},
        arch=MODEL_ARCH.QWEN3,
    ),
    "phi 3": Case(
        family="Phi3",
        options={"hidden_size": 96, "sliding_window": 50, "tie_word_embeddings": False},
        arch=MODEL_ARCH.PHI3,
        writes=phi3,
    ),
    "phi 4 mini": Case(
        family="Phi3",
        options={
            "hidden_size": 96,
            "rope_parameters": LONG_ROPE,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 700,
            "tie_word_embeddings": True,
        },
        arch=MODEL_ARCH.PHI3,
        writes=phi3,
    ),
    "olmo 2": Case(family="Olmo2", options={"hidden_size": 96}, arch=MODEL_ARCH.OLMO2),
    "smollm 3": Case(
        family="SmolLM3",
        options={"hidden_size": 96, "num_hidden_layers": 5, "tie_word_embeddings": True},
        arch=MODEL_ARCH.SMOLLM3,
    ),
    "granite": Case(
        family="Granite",
        options={
            "hidden_size": 96,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 5.0,
        },
        arch=MODEL_ARCH.GRANITE,
        writes=granite,
    ),
    "mixtral": Case(
        family="Mixtral",
        options={"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 40},
        arch=MODEL_ARCH.LLAMA,
        writes=experts,
    ),
    "qwen3 moe": Case(
        family="Qwen3Moe",
        options={
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
        arch=MODEL_ARCH.QWEN3MOE,
        writes=experts,
    ),
    "gemma 2": Case(
        family="Gemma2",
        options={
            "sliding_window": 24,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
        arch=MODEL_ARCH.GEMMA2,
        writes=gemma2,
    ),
    "gemma 3": Case(
        family="Gemma3",
        config_class="Gemma3TextConfig",
        options={
            "num_hidden_layers": 7,
            "sliding_window": 40,
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 5.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0},
            },
        },
        arch=MODEL_ARCH.GEMMA3,
        writes=gemma3,
    ),
}

FOLDER_CASES: dict[str, Case] = {
    "llama, yarn, not truncated": Case(
        family="Llama",
        options={"rope_parameters": YARN_ROPE | {"truncate": False}},
        arch=MODEL_ARCH.LLAMA,
    ),
}
"""What GGUF files cannot say."""

"""The config of a folder as the metadata of a GGUF file: the way back of read_config.py.

Keys: github.com/ggml-org/ggml, docs/gguf.md, and the constants of the `gguf` package.
"""

from math import isclose, log
from pathlib import Path

import numpy as np

from tokenmill.errors import UnsupportedModelError
from tokenmill.ir.numerics import rope_frequencies
from tokenmill.ir.order import F32Array
from tokenmill.models.config import ModelConfig, Rope
from tokenmill.models.fields import Fields
from tokenmill.models.gguf.typed import Typed, f32, string, u32
from tokenmill.models.registry import ARCHITECTURES
from tokenmill.models.safetensors import read_json

_LONG = ("longrope", "su")


def gguf_name(config: ModelConfig) -> str:
    """`general.architecture`: Mistral's and Mixtral's files call themselves llama."""
    row = ARCHITECTURES[config.architecture]
    return "llama" if row.gguf_name in ("", "llama") else row.name


def config_metadata(name: str, config: ModelConfig, scaling: Fields) -> dict[str, Typed]:
    """`general.*` and `<name>.*`; `scaling` is that of `read_scaling`."""
    own = {**_sizes(config), **_rope(config, scaling), **_options(name, config)}
    general = {"general.type": string("model"), "general.name": string(config.name)}
    return general | {f"{name}.{key}": value for key, value in own.items()}


def _sizes(config: ModelConfig) -> dict[str, Typed]:
    return {
        "block_count": u32(config.num_layers),
        "context_length": u32(config.longest_context),
        "embedding_length": u32(config.hidden_size),
        "feed_forward_length": u32(config.intermediate_size),
        "attention.head_count": u32(config.num_heads),
        "attention.head_count_kv": u32(config.num_kv_heads),
        "attention.key_length": u32(config.head_dim),
        "attention.value_length": u32(config.head_dim),
        "attention.layer_norm_rms_epsilon": f32(config.norm_eps),
        "rope.dimension_count": u32(config.rotary_dim),
        "vocab_size": u32(config.vocab_size),
    }


def _main_rope(config: ModelConfig) -> Rope:
    """That of the layers which see everything, where some have a window and a rope of their own."""
    ropes = [kind.rope for kind in config.layers if kind.rope and not kind.window]
    ropes += [kind.rope for kind in config.layers if kind.rope]
    return ropes[0] if ropes else Rope()


def read_scaling(path: Path) -> Fields:
    """What config.json says of the rope of layers that see everything, if anything."""
    content = read_json(path / "config.json")
    found = content.get("rope_scaling") or content.get("rope_parameters") or {}
    assert isinstance(found, dict), found  # read_config has read it
    inner = found.get("full_attention", found)
    return Fields(f"{path}: rope scaling", inner if isinstance(inner, dict) else found)


def _kind(scaling: Fields) -> str:
    key = "rope_type" if scaling.values.get("rope_type") is not None else "type"
    return scaling.text(key, default="default")


def _rope(config: ModelConfig, scaling: Fields) -> dict[str, Typed]:
    kind, rope = _kind(scaling), _main_rope(config)
    found = {"rope.freq_base": f32(rope.theta)}
    if kind in ("linear", "yarn"):
        factor = scaling.number("factor", most=1e6)
        found |= {"rope.scaling.type": string(kind), "rope.scaling.factor": f32(factor)}
    if kind == "yarn":
        usual = 0.1 * log(factor) + 1 if factor > 1 else 1.0  # what llama.cpp multiplies by itself
        if not isclose(rope.magnitude, usual):
            found["rope.scaling.attn_factor"] = f32(rope.magnitude / usual)
        found |= {
            f"rope.scaling.yarn_{key}": f32(scaling.number(key, most=1e6))
            for key in ("beta_fast", "beta_slow")
            if scaling.values.get(key) is not None
        }
    if kind == "yarn" or kind in _LONG:
        key = "original_max_position_embeddings"
        near = config.longest_context if kind == "yarn" else config.context_length
        length = scaling.integer(key, most=2**30, default=near)
        found["rope.scaling.original_context_length"] = u32(length)
    if kind in _LONG:
        found["rope.scaling.attn_factor"] = f32(rope.magnitude)
    return found


def _options(name: str, config: ModelConfig) -> dict[str, Typed]:
    """What only some architectures have, and only some files say."""
    reads = ARCHITECTURES[config.architecture].gguf_reads
    scales = {
        "attention.scale": config.score_scale,
        "embedding_scale": config.embedding_scale,
        "residual_scale": config.residual_scale,
        "logit_scale": 1 / config.logits_scale,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logits_softcap,
    }
    found: dict[str, Typed] = {
        key: f32(value) for key, value in scales.items() if key in reads and value
    }
    if config.window or name == "phi3":  # of which llama.cpp wants to be told that there is none
        found["attention.sliding_window"] = u32(config.window)
    if config.experts:
        found["expert_count"] = u32(config.experts.count)
        found["expert_used_count"] = u32(config.experts.per_token)
        found["expert_feed_forward_length"] = u32(config.experts.size)
    short = [kind.rope for kind in config.layers if kind.rope and kind.window]
    if name == "gemma3" and short:
        found["rope.freq_base_swa"] = f32(short[0].theta)
    return found


def frequency_factors(name: str, config: ModelConfig, scaling: Fields) -> dict[str, F32Array]:
    """By tensor: what each pair's frequency is divided by, where no key can tell it."""
    kind = _kind(scaling)
    if kind in ("default", "linear", "yarn"):
        return {}
    if name != ("phi3" if kind in _LONG else "llama"):  # llama.cpp looks for them nowhere else
        raise UnsupportedModelError(
            f"{scaling.where}: rope_type is {kind!r}, which a GGUF file of a {name} model cannot "
            "say; supported are 'default', 'linear' and 'yarn'"
        )
    if kind in _LONG:
        count = config.rotary_dim // 2
        lists = {key: scaling.numbers(f"{key}_factor", count) for key in ("long", "short")}
        return {f"rope_factors_{k}.weight": np.array(v, np.float32) for k, v in lists.items()}
    rope = _main_rope(config)
    plain = rope_frequencies(config.rotary_dim, rope.theta)
    frequencies: F32Array = np.array(rope.frequencies, np.float32)
    return {"rope_freqs.weight": (plain / frequencies).astype(np.float32)}

"""Adapters written as PEFT writes them, with random numbers, and what they make of a model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

F32Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

PLAIN_CONFIG: Mapping[str, object] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "somebody/model",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "layers_pattern": None,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_dora": False,
    "use_rslora": False,
}


def module_sizes(model: Any, modules: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the linears of these names in a model of transformers."""
    return {
        name.removesuffix(".weight"): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name.split(".")[-2] in modules and name.endswith(".weight")
    }


def write_adapter(
    folder: Path,
    sizes: Mapping[str, tuple[int, int]],
    *,
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    size: float = 1.0,
    dtype: Any = np.float32,
    tensors: Mapping[str, F32Array | None] | None = None,
    **changes: Any,
) -> Path:
    """A folder with a random adapter; `changes` are of its config, `tensors` of its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pattern = changes.get("rank_pattern")
    ranks = pattern.items() if isinstance(pattern, dict) else ()
    held: dict[str, Any] = {}
    for module, (n, k) in sizes.items():
        own = next((r for key, r in ranks if r and module.endswith(key)), rank)
        name = f"base_model.model.{module}.lora_"
        held[f"{name}A.weight"] = rng.standard_normal((own, k)) / np.sqrt(k)
        held[f"{name}B.weight"] = size * rng.standard_normal((n, own)) / np.sqrt(own) / alpha * rank
    held = {name: array.astype(dtype) for name, array in held.items()}
    held |= tensors or {}
    save_file(
        {n: a for n, a in held.items() if a is not None}, folder / "adapter_model.safetensors"
    )
    modules = sorted({module.split(".")[-1] for module in sizes})
    config = {**PLAIN_CONFIG, "r": rank, "lora_alpha": alpha, "target_modules": modules, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(model: Any, folder: Path, scales: Mapping[str, float]) -> Any:
    """A copy of a model of transformers whose weights have taken in an adapter.

    `scales` gives alpha / r by the end of a module's name; "" is for all others.
    """
    import copy

    import torch
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            module = name.removesuffix(".weight")
            pair = [tensors.get(f"base_model.model.{module}.lora_{f}.weight") for f in "AB"]
            if pair[0] is not None:
                scale = next(s for end, s in scales.items() if module.endswith(end))
                a, b = (factor.double() for factor in pair)
                parameter += (scale * (b @ a)).float()
    return changed

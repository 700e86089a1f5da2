"""How much each input of a matrix matters: the mean square of the activations that it meets.

What llama.cpp calls an importance matrix, which its types of less than 3 bits want. Computed by
transformers (with torch and accelerate) in float32.
"""

from pathlib import Path
from typing import Any

import numpy as np

F32Array = np.ndarray[Any, np.dtype[np.float32]]


def measure_importance(path: Path, windows: list[list[int]]) -> dict[str, F32Array]:
    """Mean squares [K] over windows of tokens, by the matrix's name in the GGUF file `path`."""
    import torch
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    architecture = GGUFReader(path).fields["general.architecture"].contents()
    kind = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, model.config.num_hidden_layers)
    sums: dict[str, F32Array] = {}

    def watch(name: str, module: torch.nn.Linear) -> None:
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].reshape(-1, module.in_features).square().sum(0).numpy()
            sums[name] = sums.get(name, np.zeros_like(squares)) + squares

        module.register_forward_pre_hook(add)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            found = names.get_name(f"{name}.weight", (".weight",))
            assert found, name
            watch(found, module)
    with torch.no_grad():
        for tokens in windows:
            model(torch.tensor([tokens]))
    count = sum(map(len, windows))
    return {name: total / np.float32(count) for name, total in sums.items()}

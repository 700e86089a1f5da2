"""Whole models out of quantised folders, against transformers with the weights they stand for."""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from tests.backend.llvm_models import make_llvm_model
from tests.backend.traffic import Traffic, random_steps, run_traffic, shuffled_tables
from tests.e2e.architecture_files import CASES, VOCAB, make_model
from tests.quantized_modules import SCHEMES, write_safetensors
from tokenmill.backends.base import CompiledModel, F32Array, I32Array, StepLimits
from tokenmill.backends.llvm.objects import ObjectCache
from tokenmill.backends.reference.model import ReferenceModel
from tokenmill.models.checkpoint import open_checkpoint
from tokenmill.models.registry import build_graph
from tokenmill.models.weights import load_weights

LENGTHS = (1, 40)
LIMITS = StepLimits(
    tokens=64, sequences=2, rows=64, blocks=8, blocks_per_sequence=4, slots=2, vocab_size=VOCAB
)
LINEAR = re.compile(r"(_proj|\.w[123])\.weight$")
MODELS = [
    ("llama 3", "gptq"),
    ("qwen2, yarn", "gptq, zero points"),
    ("qwen3", "gptq, act-order"),
    ("phi 3", "awq"),  # q, k and v in one tensor, of which rows are taken
    ("phi 4 mini", "gptq v2, zero points"),  # rows of heads are put in order
    ("mixtral", "packed int4, zero points"),  # experts are stacked
    ("gemma 3", "int8"),
    ("llama 3", "fp8, blocks"),
    ("qwen3 moe", "compressed fp8"),
]


@cache
def texts() -> tuple[I32Array, ...]:
    rng = np.random.default_rng(1)
    return tuple(rng.integers(0, VOCAB, n, np.int32) for n in LENGTHS)


def quantise(name: str, scheme_name: str, folder: Path) -> tuple[Path, list[F32Array]]:
    """A folder with random modules for all linears; transformers' logits with what they mean."""
    case, scheme, rng = CASES[name], SCHEMES[scheme_name], np.random.default_rng(5)
    options = {**case.options, "num_hidden_layers": 2}
    plain, quantised = folder / "plain", folder / "quantised"
    make_model(replace(case, options=options)).save_pretrained(plain)
    quantised.mkdir()
    tensors: dict[str, np.ndarray] = {}
    values = load_file(plain / "model.safetensors")
    for key, value in values.items():
        if not LINEAR.search(key):
            tensors[key] = value
            continue
        parts, values[key] = scheme.make(rng, *value.shape)
        tensors |= {f"{key.removesuffix('.weight')}.{p}": array for p, array in parts.items()}
    write_safetensors(plain / "model.safetensors", values)
    write_safetensors(quantised / "model.safetensors", tensors)
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = dict(scheme.config)
    (quantised / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager")
    with torch.inference_mode():
        tokens = (torch.tensor(text[None].astype(np.int64)) for text in texts())
        return quantised, [model.float()(t).logits[0].numpy() for t in tokens]


def errors(model: CompiledModel, expected: list[F32Array]) -> float:
    rng = np.random.default_rng(2)
    traffic = Traffic(
        sequences=texts(),
        tables=shuffled_tables(rng, LIMITS, LENGTHS),
        steps=random_steps(rng, LENGTHS, LIMITS.tokens),
    )
    found = run_traffic(model, traffic)
    model.close()
    norms = [
        np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
        for ours, theirs in zip(found, expected, strict=True)
    ]
    return float(np.concatenate(norms).max())


@pytest.mark.parametrize(("name", "scheme"), MODELS)
def test_logits_are_those_of_the_weights_that_the_folder_stands_for(
    name: str, scheme: str, tmp_path: Path
) -> None:
    folder, expected = quantise(name, scheme, tmp_path)
    checkpoint = open_checkpoint(folder)
    graph = build_graph(checkpoint.config)
    shapes = {n: tuple(int(d) for d in t.shape) for n, t in graph.weights().items()}
    exact = {w.name: w.weight for w in load_weights(checkpoint, shapes, "f32")}
    assert errors(ReferenceModel(graph, exact, limits=LIMITS), expected) <= 1e-4
    packed = {w.name: w.weight for w in load_weights(checkpoint, shapes, "auto")}
    objects = ObjectCache(tmp_path / "objects")
    assert errors(make_llvm_model(graph, packed, limits=LIMITS, objects=objects), expected) < 0.05

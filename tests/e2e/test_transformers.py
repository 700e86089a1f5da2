"""Small random models against transformers in float32: the same logits at every position."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.backend.llvm_models import make_llvm_model
from tests.backend.traffic import Traffic, random_steps, run_traffic, shuffled_tables
from tests.e2e.random_models import Shape, hugging_face_model
from tokenmill.backends.base import CompiledModel, StepLimits
from tokenmill.backends.llvm.objects import ObjectCache
from tokenmill.backends.reference.model import ReferenceModel
from tokenmill.ir.formats import Weight
from tokenmill.ir.graph import Graph
from tokenmill.models.config import LayerKind, ModelConfig, Rope
from tokenmill.models.registry import build_graph

CANONICAL = {
    "model.embed_tokens": "embed",
    "model.norm": "final_norm",
    "lm_head": "lm_head",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}


SHAPES = {
    "1:1": Shape(kv_heads=3, group=1, head_dim=16, hidden=48, inner=100),
    "2:1, long theta": Shape(
        kv_heads=1, group=2, head_dim=64, hidden=64, inner=96, theta=1e6, layers=3
    ),
    "3:1, odd sizes": Shape(
        kv_heads=3, group=3, head_dim=10, hidden=45, inner=77, vocab_size=301, is_tied=False
    ),
    "5:1, narrow heads": Shape(kv_heads=1, group=5, head_dim=8, hidden=35, inner=65),
    "7:1, as Qwen2.5 0.5B": Shape(kv_heads=2, group=7, head_dim=24, hidden=98, inner=33),
    "8:1, wide heads": Shape(
        kv_heads=1, group=8, head_dim=80, hidden=136, inner=160, is_tied=False
    ),
    "4:1, head_dim 128": Shape(kv_heads=1, group=4, head_dim=128, hidden=36, inner=48, layers=1),
}
LENGTHS = (1, 2, 17, 64, 255, 600)


def our_graph(architecture: str, shape: Shape) -> Graph:
    config = ModelConfig(
        architecture=architecture,
        name="random",
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden,
        layers=(LayerKind(rope=Rope(theta=shape.theta)),) * shape.layers,
        num_heads=shape.kv_heads * shape.group,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rotary_dim=shape.head_dim,
        intermediate_size=shape.inner,
        norm_eps=1e-5,
        context_length=1024,
        is_tied=shape.is_tied,
        has_attention_bias=architecture == "qwen2",
    )
    return build_graph(config)


def our_weights(model: torch.nn.Module, is_tied: bool) -> dict[str, Weight]:
    """The model's parameters under our names, as float32."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if not (is_tied and name == "lm_head.weight"):
            array = np.atleast_2d(tensor.numpy().astype(np.float32))
            weights[canonical_name(name)] = Weight(format="f32", quants=array)
    return weights


def canonical_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    prefix = ""
    if stem.startswith("model.layers."):
        _, _, index, stem = stem.split(".", 3)
        prefix = f"layers.{index}."
    return prefix + CANONICAL[stem] + ("_bias" if kind == "bias" else "")


def make_model(
    backend: str, graph: Graph, weights: Mapping[str, Weight], limits: StepLimits, cache: Path
) -> CompiledModel:
    if backend == "reference":
        return ReferenceModel(graph, weights, limits=limits)
    row = "portable" if backend == "llvm, portable" else None
    return make_llvm_model(graph, weights, limits=limits, objects=ObjectCache(cache), row=row)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Architectures of equal sizes have many kernels in common."""
    return tmp_path_factory.mktemp("objects")


@pytest.mark.parametrize(
    ("backend", "architecture", "shape"),
    [
        *product(("reference", "llvm"), ("llama", "qwen2"), SHAPES),
        ("llvm, portable", "qwen2", "3:1, odd sizes"),
        ("llvm, portable", "llama", "7:1, as Qwen2.5 0.5B"),
    ],
)
def test_logits_are_those_of_transformers(
    backend: str, architecture: str, shape: str, objects: Path
) -> None:
    sizes = SHAPES[shape]
    theirs = hugging_face_model(architecture, sizes)
    limits = StepLimits(
        tokens=128,
        sequences=4,
        rows=128,
        blocks=80,
        blocks_per_sequence=40,
        slots=4,
        vocab_size=sizes.vocab_size,
    )
    graph, weights = our_graph(architecture, sizes), our_weights(theirs, sizes.is_tied)
    ours = make_model(backend, graph, weights, limits, objects)
    rng = np.random.default_rng(1)
    for lengths in (LENGTHS[:4], LENGTHS[4:]):
        traffic = Traffic(
            sequences=tuple(rng.integers(0, sizes.vocab_size, n, np.int32) for n in lengths),
            tables=shuffled_tables(rng, limits, lengths),
            steps=random_steps(rng, lengths, limits.tokens),
        )
        for tokens, found in zip(traffic.sequences, run_traffic(ours, traffic), strict=True):
            with torch.inference_mode():
                expected = theirs(torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()
            errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
            assert errors.max() <= 1e-4, (len(tokens), errors.max())
    ours.close()

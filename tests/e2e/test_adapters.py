"""LoRA adapters against merged weights in transformers, and their bits against all company."""

from dataclasses import replace
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.backend.llvm_models import make_llvm_model
from tests.backend.traffic import Traffic, random_steps, run_traffic, shuffled_tables
from tests.e2e.adapter_files import ALL_MODULES, merged, module_sizes, write_adapter
from tests.e2e.architecture_files import CASES, VOCAB, make_model, write_gguf
from tokenmill.backends.base import CompiledModel, F32Array, I32Array, StepLimits
from tokenmill.backends.llvm.objects import ObjectCache
from tokenmill.backends.reference.model import ReferenceModel
from tokenmill.config import ACTIVATIONS
from tokenmill.ir.formats import Weight
from tokenmill.ir.graph import Graph
from tokenmill.models.adapters import TARGETS, Adapter, AdapterReader
from tokenmill.models.checkpoint import open_checkpoint
from tokenmill.models.registry import build_graph
from tokenmill.models.weights import load_weights
from tokenmill.passes.add_adapters import AdapterRoom, adaptable, add_adapters

LENGTHS = (40, 17, 60, 33)
MAX_RANK, SLOTS = 20, 3
LIMITS = StepLimits(
    tokens=64,
    sequences=4,
    rows=64,
    blocks=20,
    blocks_per_sequence=8,
    slots=4,
    vocab_size=VOCAB,
    adapter_slots=SLOTS,
)
MODULES = {
    "llama 3": ALL_MODULES,
    "qwen2, yarn": ALL_MODULES,
    "qwen3": ALL_MODULES,
    "phi 4 mini": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gemma 3": ALL_MODULES,
    "qwen3 moe": ("q_proj", "v_proj", "o_proj"),
}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> ObjectCache:
    return ObjectCache(tmp_path_factory.mktemp("objects"))


@cache
def texts() -> tuple[I32Array, ...]:
    rng = np.random.default_rng(1)
    return tuple(rng.integers(0, VOCAB, n, np.int32) for n in LENGTHS)


def logits_of(model: Any, text: I32Array) -> F32Array:
    with torch.inference_mode():
        found: F32Array = model(torch.tensor(text[None].astype(np.int64))).logits[0].numpy()
    return found


def read_model(path: Path, dtype: str = "lora") -> tuple[Graph, dict[str, Weight], AdapterReader]:
    """A model's graph with room for adapters, its weights, and what reads adapters for it."""
    checkpoint = open_checkpoint(path)
    graph = build_graph(checkpoint.config)
    shapes = {n: tuple(int(d) for d in t.shape) for n, t in graph.weights().items()}
    weights = {w.name: w.weight for w in load_weights(checkpoint, shapes, "f32")}
    sizes = adaptable(graph, TARGETS)
    reader = AdapterReader(config=checkpoint.config, sizes=sizes, max_rank=MAX_RANK)
    room = AdapterRoom(slots=SLOTS, rank=MAX_RANK, dtype=dtype)
    return add_adapters(graph, room, TARGETS), weights, reader


def traffic_of(seed: int, adapters: list[int]) -> Traffic:
    rng = np.random.default_rng(seed)
    return Traffic(
        sequences=texts(),
        tables=shuffled_tables(rng, LIMITS, LENGTHS),
        steps=random_steps(rng, LENGTHS, LIMITS.tokens),
        adapters=np.array(adapters, np.int32),
    )


@pytest.mark.parametrize("name", MODULES)
def test_logits_are_those_of_merged_weights(
    name: str, tmp_path: Path, objects: ObjectCache
) -> None:
    """Two adapters and none in one batch; ranks and factors that differ from module to module."""
    base = make_model(CASES[name])
    base.save_pretrained(tmp_path / "model")
    sizes = module_sizes(base, MODULES[name])
    patterns = {"rank_pattern": {"o_proj": 7}, "alpha_pattern": {"layers.1.self_attn.o_proj": 3}}
    first = write_adapter(tmp_path / "first", sizes, rank=4, alpha=8, **patterns)
    some = {m: s for m, s in sizes.items() if ".layers.1." in m and "up_proj" not in m}
    second = write_adapter(
        tmp_path / "second",
        some,
        rank=MAX_RANK,
        alpha=6,
        seed=1,
        use_rslora=True,
        layers_to_transform=[1],
    )
    scales = {"layers.1.self_attn.o_proj": 3 / 7, "o_proj": 8 / 7, "": 2}
    theirs = [merged(base, first, scales), merged(base, second, {"": 6 / sqrt(MAX_RANK)}), base]
    graph, weights, reader = read_model(tmp_path / "model")
    adapters = [reader.read("first", first), reader.read("second", second)]
    traffic = traffic_of(2, [0, 2, -1, 0])
    for make in ("reference", "llvm"):
        model: CompiledModel
        if make == "reference":
            model = ReferenceModel(graph, weights, limits=LIMITS)
        else:
            model = make_llvm_model(graph, weights, limits=LIMITS, objects=objects)
        for slot, adapter in zip((0, 2), adapters, strict=True):
            model.set_adapter(slot, adapter.changes)
        pairs = zip(run_traffic(model, traffic), texts(), (0, 1, 2, 0), strict=True)
        for found, text, which in pairs:
            expected = logits_of(theirs[which], text)
            errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
            assert errors.max() <= 1e-4, (make, which, errors.max())
            if which < 2:  # the adapter says something
                plain = logits_of(base, text)
                assert np.linalg.norm(plain - expected) > 0.05 * np.linalg.norm(plain)
        model.close()


def test_an_adapter_fits_a_gguf_file_of_its_model(tmp_path: Path, objects: ObjectCache) -> None:
    """Such a file has the rows of q and k in another order."""
    name = "llama 3"
    base = make_model(CASES[name])
    path = write_gguf(tmp_path / "model.gguf", base, CASES[name])
    folder = write_adapter(
        tmp_path / "adapter", module_sizes(base, ALL_MODULES), dtype=np.float16, alpha=4
    )
    graph, weights, reader = read_model(path)
    model = make_llvm_model(graph, weights, limits=LIMITS, objects=objects)
    model.set_adapter(1, reader.read("a", folder).changes)
    theirs = merged(base, folder, {"": 1})
    for found, text in zip(run_traffic(model, traffic_of(3, [1] * 4)), texts(), strict=True):
        expected = logits_of(theirs, text)
        errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert errors.max() <= 1e-4
    model.close()


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("name", ["llama 3", "gemma 3"])
def test_bits_depend_on_nothing_but_the_adapter(
    name: str, activations: str, tmp_path: Path, objects: ObjectCache
) -> None:
    """Not on company, chunks, threads, or the slot; without one, they are the model's own."""
    base = make_model(CASES[name])
    base.save_pretrained(tmp_path / "model")
    sizes = module_sizes(base, ALL_MODULES)
    dtype = "lora" if activations == "f32" else "lora16"
    graph, weights, reader = read_model(tmp_path / "model", dtype)
    adapters: list[Adapter] = [
        reader.read(str(i), write_adapter(tmp_path / str(i), sizes, rank=r, seed=i))
        for i, r in enumerate((3, 16))
    ]
    numbers = {"activations": activations, "cache": "bf16", "objects": objects}
    plain_graph = build_graph(open_checkpoint(tmp_path / "model").config)
    plain_limits = replace(LIMITS, adapter_slots=0)
    plain = make_llvm_model(plain_graph, weights, limits=plain_limits, threads=1, **numbers)
    expected = run_traffic(plain, replace(traffic_of(4, []), adapters=None))
    plain.close()
    whose = [0, -1, 1, 0]
    for threads in (1, 2, 3):
        model = make_llvm_model(graph, weights, limits=LIMITS, threads=threads, **numbers)
        rng = np.random.default_rng(threads)
        for _ in range(2):
            slots = rng.permutation(SLOTS)[:2]
            for slot, adapter in zip(slots.tolist(), adapters, strict=True):
                model.set_adapter(slot, adapter.changes)
            placed = [int(slots[i]) if i >= 0 else -1 for i in whose]
            found = run_traffic(model, traffic_of(int(rng.integers(99)), placed))
            if threads == 1 and _ == 0:
                expected = [expected[i] if w < 0 else found[i] for i, w in enumerate(whose)]
            for mine, other in zip(found, expected, strict=True):
                assert mine.tobytes() == other.tobytes()
        alone = replace(
            traffic_of(9, placed), steps=random_steps(rng, (LENGTHS[0],), LIMITS.tokens)
        )
        assert run_traffic_of_first(model, alone).tobytes() == expected[0].tobytes()
        model.close()


def run_traffic_of_first(model: CompiledModel, traffic: Traffic) -> F32Array:
    return run_traffic(model, replace(traffic, sequences=traffic.sequences[:1]))[0]

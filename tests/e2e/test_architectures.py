"""Every architecture against transformers in float32, from a folder and from a GGUF file."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.backend.llvm_models import make_llvm_model
from tests.backend.traffic import (
    Traffic,
    random_steps,
    run_traffic,
    shuffled_tables,
    window_tables,
)
from tests.e2e.architecture_files import CASES, FOLDER_CASES, VOCAB, make_model, write_gguf
from tokenmill.backends.base import CompiledModel, F32Array, I32Array, StepLimits
from tokenmill.backends.llvm.objects import ObjectCache
from tokenmill.backends.reference.model import ReferenceModel
from tokenmill.config import ACTIVATIONS
from tokenmill.ir.formats import Weight
from tokenmill.ir.graph import Graph
from tokenmill.models.checkpoint import open_checkpoint
from tokenmill.models.registry import ARCHITECTURES, build_graph
from tokenmill.models.weights import load_weights

LENGTHS = (1, 17, 90, 300)
LIMITS = StepLimits(
    tokens=128,
    sequences=4,
    rows=128,
    blocks=40,
    blocks_per_sequence=20,
    slots=4,
    vocab_size=VOCAB,
)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> ObjectCache:
    return ObjectCache(tmp_path_factory.mktemp("objects"))


@cache
def texts() -> tuple[I32Array, ...]:
    rng = np.random.default_rng(1)
    return tuple(rng.integers(0, VOCAB, n, np.int32) for n in LENGTHS)


@cache
def theirs(name: str) -> tuple[Any, list[F32Array]]:
    """A model of transformers, and its logits for every text."""
    model = make_model((CASES | FOLDER_CASES)[name])
    with torch.inference_mode():
        tensors = (torch.tensor(text[None].astype(np.int64)) for text in texts())
        return model, [model(tensor).logits[0].numpy() for tensor in tensors]


def read_model(path: Path) -> tuple[Graph, dict[str, Weight]]:
    checkpoint = open_checkpoint(path)
    graph = build_graph(checkpoint.config)
    shapes = {n: tuple(int(d) for d in t.shape) for n, t in graph.weights().items()}
    loaded = load_weights(checkpoint, shapes, "f32")
    return graph, {w.name: w.weight for w in loaded}


def assert_same_logits(
    make: str, graph: Graph, weights: Mapping[str, Weight], objects: ObjectCache, name: str
) -> None:
    model: CompiledModel
    if make == "reference":
        model = ReferenceModel(graph, weights, limits=LIMITS)
    else:
        row = "portable" if make == "portable" else None
        model = make_llvm_model(graph, weights, limits=LIMITS, objects=objects, row=row)
    rng = np.random.default_rng(2)
    traffic = Traffic(
        sequences=texts(),
        tables=shuffled_tables(rng, LIMITS, LENGTHS),
        steps=random_steps(rng, LENGTHS, LIMITS.tokens),
    )
    for found, expected in zip(run_traffic(model, traffic), theirs(name)[1], strict=True):
        errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert errors.max() <= 1e-4, (len(found), errors.max())
    model.close()


@pytest.mark.parametrize("name", CASES | FOLDER_CASES)
def test_logits_from_a_folder_are_those_of_transformers(
    name: str, tmp_path: Path, objects: ObjectCache
) -> None:
    theirs(name)[0].save_pretrained(tmp_path)
    graph, weights = read_model(tmp_path)
    for make in ("reference", "llvm"):
        assert_same_logits(make, graph, weights, objects, name)


@pytest.mark.parametrize("name", CASES)
def test_logits_from_a_gguf_file_are_those_of_transformers(
    name: str, tmp_path: Path, objects: ObjectCache
) -> None:
    path = write_gguf(tmp_path / "model.gguf", theirs(name)[0], CASES[name])
    graph, weights = read_model(path)
    assert_same_logits("llvm", graph, weights, objects, name)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
@pytest.mark.parametrize("length", [200, 300])
def test_longrope_beyond_the_first_context(length: int, kind: str, tmp_path: Path) -> None:
    """transformers takes the long factors for a text of more than `length` tokens, as we do where
    we are told that texts may be longer.
    """
    case = CASES["phi 4 mini"]
    case = replace(case, options={**case.options, "original_max_position_embeddings": 250})
    model = make_model(case)
    text = texts()[3][:length]
    with torch.inference_mode():
        expected = model(torch.tensor(text[None].astype(np.int64))).logits[0].numpy()
    model.save_pretrained(tmp_path)
    path = tmp_path if kind == "folder" else write_gguf(tmp_path / "model.gguf", model, case)
    config = open_checkpoint(path).config
    assert (config.context_length, config.longest_context) == (250, 4096)
    stretched = config.stretched_to(length)
    assert stretched.context_length == (4096 if length > 250 else 250)
    graph, weights = build_graph(stretched), read_model(path)[1]
    rng = np.random.default_rng(4)
    traffic = Traffic(
        sequences=(text,),
        tables=shuffled_tables(rng, LIMITS, (length,)),
        steps=random_steps(rng, (length,), LIMITS.tokens),
    )
    [found] = run_traffic(ReferenceModel(graph, weights, limits=LIMITS), traffic)
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert errors.max() <= 1e-4


@pytest.mark.parametrize("name", ["gemma 2", "qwen3"])
def test_logits_on_portable_vectors_are_those_of_transformers(
    name: str, tmp_path: Path, objects: ObjectCache
) -> None:
    theirs(name)[0].save_pretrained(tmp_path)
    assert_same_logits("portable", *read_model(tmp_path), objects, name)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("name", ["gemma 3", "qwen3 moe"])
def test_bits_do_not_depend_on_company_chunks_or_threads(
    name: str, activations: str, tmp_path: Path, objects: ObjectCache
) -> None:
    """Of layers with a pool of their own, and of experts, whose rows change with the company."""
    path = write_gguf(tmp_path / "model.gguf", theirs(name)[0], CASES[name])
    graph, weights = read_model(path)
    window = open_checkpoint(path).config.window
    limits = replace(LIMITS, window=window, window_blocks=43 if window else 0)
    rng, found = np.random.default_rng(3), []
    for threads, sequences in ((1, 4), (2, 4), (3, 4), (2, 1)):
        lengths = LENGTHS[-sequences:]
        traffic = Traffic(
            sequences=texts()[-sequences:],
            tables=shuffled_tables(rng, limits, lengths),
            steps=random_steps(rng, lengths, limits.tokens),
            window=window,
            window_tables=window_tables(rng, limits, lengths),
        )
        model = make_llvm_model(
            graph,
            weights,
            limits=limits,
            objects=objects,
            activations=activations,
            cache="bf16",
            threads=threads,
        )
        found.append(run_traffic(model, traffic))
        model.close()
    for other in found[1:]:
        assert all(map(np.array_equal, reversed(other), reversed(found[0])))


def test_every_architecture_is_tried() -> None:
    tried = {f"{case.family}ForCausalLM" for case in CASES.values()}
    decoders = {a.hf_class for a in ARCHITECTURES.values() if a.hf_class.endswith("ForCausalLM")}
    assert tried == decoders  # for encoders see test_encoders.py

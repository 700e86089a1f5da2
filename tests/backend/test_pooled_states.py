"""Hidden states: of encoders, in which tokens see both ways, and of decoders beside logits."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.backend.graphs import graphs, random_weights
from tests.backend.llvm_models import make_llvm_model
from tests.backend.traffic import Chunk, Traffic, make_limits, make_step, shuffled_tables
from tests.unit.llvm.native import WHOLE_ROWS
from tokenmill.backends.base import CompiledModel, F32Array, StepInput, StepLimits
from tokenmill.backends.llvm.objects import ObjectCache
from tokenmill.backends.reference.model import ReferenceModel
from tokenmill.ir.formats import Weight
from tokenmill.ir.graph import Graph
from tokenmill.models.config import Encoder, LayerKind, ModelConfig
from tokenmill.models.registry import build_graph
from tokenmill.passes.pipeline import numeric_passes, run_passes
from tokenmill.passes.return_hidden import return_hidden

VOCAB = 61
FEW = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> ObjectCache:
    return ObjectCache(tmp_path_factory.mktemp("objects"))


@st.composite
def encoders(draw: st.DrawFn) -> ModelConfig:
    """Of awkward sizes: heads that fill no vector, rows that fill no tile."""
    head_dim, num_heads = draw(st.sampled_from((6, 16, 20, 32, 36, 64))), draw(st.integers(1, 5))
    is_bert = draw(st.booleans())
    windows = st.sampled_from((0, 1, 3, 16, 200))
    kinds = st.builds(LayerKind, window=st.just(0) if is_bert else windows)
    return ModelConfig(
        architecture="bert" if is_bert else "nomic-bert",
        name="random",
        vocab_size=VOCAB,
        hidden_size=head_dim * num_heads,
        layers=tuple(draw(st.lists(kinds, min_size=1, max_size=3))),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        rotary_dim=head_dim,
        intermediate_size=draw(st.integers(5, 150)),
        norm_eps=1e-6,
        context_length=300,
        is_tied=True,
        has_attention_bias=is_bert,
        encoder=Encoder(
            num_positions=302 * is_bert,
            first_position=draw(st.sampled_from((0, 2))),
            num_segments=2,
            num_labels=draw(st.sampled_from((0, 0, 1))),
        ),
    )


def whole_step(rng: np.random.Generator, limits: StepLimits, lengths: list[int]) -> StepInput:
    """Sequences in one piece each, in shuffled blocks; all their states are wanted."""
    texts = tuple(np.random.default_rng(n).integers(0, VOCAB, n, np.int32) for n in lengths)
    tables = shuffled_tables(rng, limits, lengths)
    traffic = Traffic(sequences=texts, tables=tables, steps=(), window=0, window_tables=None)
    chunks = [Chunk(sequence=i, start=0, length=n) for i, n in enumerate(lengths)]
    step = make_step(traffic, chunks)
    return replace(
        step,
        rows=np.empty(0, np.int32),
        want_logits=False,
        pooled=np.arange(sum(lengths), dtype=np.int32),
        segments=(step.positions % 3 == 2).astype(np.int32),
    )


def states(model: CompiledModel, step: StepInput) -> F32Array:
    model.post(step)
    hidden = model.wait().hidden
    assert hidden is not None
    return hidden


def formats_of(graph: Graph, weights: dict[str, Weight]) -> dict[str, str]:
    kinds = graph.weights()
    return {n: w.format for n, w in weights.items() if kinds[n].dtype == "w"}


@pytest.mark.parametrize("row", [None, *WHOLE_ROWS[-1:]])
def test_an_encoders_states_are_the_references(row: str | None, objects: ObjectCache) -> None:
    @settings(FEW, max_examples=6 if row is None else 2)
    @given(config=encoders(), seed=st.integers(0, 2**32 - 1))
    def check(config: ModelConfig, seed: int) -> None:
        rng = np.random.default_rng(seed)
        graph, limits = build_graph(config), make_limits(VOCAB)
        weights = random_weights(graph, ["f32", "q8"], seed=seed)
        passes = numeric_passes(formats=formats_of(graph, weights), activations="f32", cache="f32")
        lengths = [17, 1, 24, 5]
        step = whole_step(rng, limits, lengths)
        reference = ReferenceModel(run_passes(graph, passes), weights, limits=limits)
        model = make_llvm_model(graph, weights, limits=limits, objects=objects, row=row)
        expected, found = states(reference, step), states(model, step)
        model.close()
        assert found.shape == (sum(lengths), 1 if config.encoder.num_labels else config.hidden_size)
        scale = np.linalg.norm(expected) / np.sqrt(len(expected))
        assert np.abs(found - expected).max() < 2e-5 * scale

    check()


@pytest.mark.parametrize("activations", ["f32", "bf16", "int8"])
def test_an_encoders_bits_do_not_depend_on_company_or_threads(
    activations: str, objects: ObjectCache
) -> None:
    config = _encoder()
    graph, limits = build_graph(config), make_limits(VOCAB)
    weights = random_weights(graph, ["q8", "bf16"], seed=3)
    rng, found = np.random.default_rng(5), []
    for threads, lengths in ((1, [23, 1, 40]), (2, [23]), (3, [23, 30, 2, 9])):
        model = make_llvm_model(
            graph,
            weights,
            limits=limits,
            objects=objects,
            activations=activations,
            cache="f32" if activations == "f32" else "bf16",
            threads=threads,
        )
        found.append(states(model, whole_step(rng, limits, lengths))[:23])
        model.close()
    assert all(np.array_equal(found[0], other) for other in found[1:])


def _encoder() -> ModelConfig:
    return ModelConfig(
        architecture="bert",
        name="fixed",
        vocab_size=VOCAB,
        hidden_size=72,
        layers=(LayerKind(rope=None),) * 2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=36,
        rotary_dim=36,
        intermediate_size=100,
        norm_eps=1e-6,
        context_length=300,
        is_tied=True,
        has_attention_bias=True,
        encoder=Encoder(num_positions=300, first_position=0, num_segments=2),
    )


def test_a_decoders_states_come_beside_unchanged_logits(objects: ObjectCache) -> None:
    """Steps with pooled tokens and without run by two programs over one cache."""

    @settings(FEW, max_examples=4)
    @given(graph=graphs().filter(_ends_in_a_norm), seed=st.integers(0, 2**32 - 1))
    def check(graph: Graph, seed: int) -> None:
        rng = np.random.default_rng(seed)
        weights = random_weights(graph, ["q8", "bf16"], seed=seed)
        vocab_size = int(graph.weights()["embed"].shape[0])
        limits = make_limits(vocab_size)
        texts = tuple(rng.integers(0, vocab_size, n, np.int32) for n in (19, 8))
        traffic = Traffic(
            sequences=texts,
            tables=shuffled_tables(rng, limits, (19, 8)),
            steps=(),
            window=0,
            window_tables=None,
        )
        first = make_step(traffic, [Chunk(sequence=0, start=0, length=11)])
        second = make_step(
            traffic,
            [Chunk(sequence=0, start=11, length=8), Chunk(sequence=1, start=0, length=8)],
        )
        pooled = np.array([0, 3, 7, 15], np.int32)
        plain = make_llvm_model(graph, weights, limits=limits, objects=objects)
        both = make_llvm_model(graph, weights, limits=limits, objects=objects, has_pooling=True)
        outputs = []
        for model, step in ((plain, second), (both, replace(second, pooled=pooled))):
            model.post(first)
            model.wait()
            model.post(step)
            outputs.append(model.wait())
        assert np.array_equal(outputs[0].logits, outputs[1].logits)
        assert outputs[0].hidden is None
        both.post(second)
        assert np.array_equal(both.wait().logits, outputs[0].logits)
        formats = formats_of(graph, weights)
        passes = numeric_passes(formats=formats, activations="f32", cache="f32")
        reference = ReferenceModel(return_hidden(run_passes(graph, passes)), weights, limits=limits)
        reference.post(replace(first, pooled=np.empty(0, np.int32)))
        reference.wait()
        expected = states(reference, replace(second, pooled=pooled))
        found = outputs[1].hidden
        assert found is not None
        errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert errors.max() < 1e-3  # random graphs may be ill conditioned; see suite.py
        assert np.median(errors) < 1e-4
        plain.close()
        both.close()

    check()


def _ends_in_a_norm(graph: Graph) -> bool:
    ops = [node.op for node in graph.main.nodes]
    has_window = any(
        len(v.type.shape) > 2 for f in graph.functions for n in f.nodes for v in n.results
        if v.type.dtype == "kv"
    )  # fmt: skip
    return (
        "rmsnorm" in ops[ops.index("select_rows") :]
        and len(graph.main.returns) == 2
        and (not has_window)
    )

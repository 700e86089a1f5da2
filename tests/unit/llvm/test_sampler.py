"""The compiled sampler against ir/sampling.py, alone: logits in, tokens out, on every row."""

from dataclasses import dataclass, fields, replace
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backend.sampling_rows import possible_tokens, random_sampling
from tests.unit.llvm.native import ROW_NAMES, aligned, call, load
from tokenmill.backends.base import BiasInput, F32Array, I32Array, MaskInput, SampleInput
from tokenmill.backends.llvm.compile import LoadedObject
from tokenmill.backends.llvm.context import Context
from tokenmill.backends.llvm.lower import Options, lower, lower_alone
from tokenmill.backends.llvm.model import SAMPLE_FIELDS
from tokenmill.backends.llvm.scope import Buffer
from tokenmill.backends.llvm.target import Row, pick_row
from tokenmill.backends.reference.model import sampling_rows
from tokenmill.ir.build import FunctionBuilder, finish_graph
from tokenmill.ir.graph import Graph
from tokenmill.ir.sampling import restrict, sample_row

AnyArray = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

VOCAB_SIZES = (1, 15, 16, 33, 100, 1000)
SLOTS = 8


@pytest.fixture(params=ROW_NAMES)
def row(request: pytest.FixtureRequest) -> Row:
    return pick_row(request.param)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The sampling phase of a step, and where it looks for logits."""

    code: LoadedObject
    logits: Buffer

    def run(self, logits_RV: F32Array, sampling: SampleInput) -> tuple[I32Array, I32Array]:
        """The tokens of the rows, and the slots after."""
        count, vocab_size = logits_RV.shape
        arena = aligned(self.logits.offset + count * self.logits.stride)
        rows = arena[self.logits.offset :].view(np.float32).reshape(count, -1)
        rows[:] = 1e9  # what lies beyond the vocabulary must not count
        rows[:, :vocab_size] = logits_RV
        stride = -(-vocab_size // 16) * 16
        scratch, sampled = aligned(4 * stride), np.zeros(count, np.int32)
        slots = np.full(SLOTS, -1, np.int32)
        context = Context()
        context["R"], context["vocab"], context["sample_stride"] = count, vocab_size, 4 * stride
        context["is_sampling"] = 1
        arrays = {"arena": arena, "sample_scratch": scratch, "sampled": sampled, "slots": slots}
        arrays |= _arrays(context, sampling)
        for field, array in arrays.items():
            context.point(field, array)
        call(self.code, "step", context.address, 0, 1)
        return sampled, slots


def _arrays(context: Context, sampling: SampleInput) -> dict[str, AnyArray]:
    arrays = {f: np.ascontiguousarray(getattr(sampling, n)) for n, f in SAMPLE_FIELDS.items()}
    nothing = np.zeros(len(sampling.slots) + 1, np.int32)
    arrays["bias_starts"], arrays["mask_rows"] = nothing, nothing - 1
    if sampling.biases is not None:
        arrays |= {f"bias_{f.name}": getattr(sampling.biases, f.name) for f in fields(BiasInput)}
    if sampling.masks is not None:
        arrays |= {"mask_rows": sampling.masks.rows, "masks": sampling.masks.words}
        context["mask_words"] = sampling.masks.words.shape[1]
    return arrays


@cache
def sampler(row: Row, vocab_size: int) -> Sampler:
    graph = sampling_graph(vocab_size)
    options = Options(row=row, activations="f32", max_tokens=1, max_rows=64)
    module = lower_alone(graph, options, graph.main.nodes[-1])
    return Sampler(code=load(module, row), logits=lower(graph, options).logits)


def sampling_graph(vocab_size: int) -> Graph:
    f = FunctionBuilder("main")
    tokens, rows = f.param("tokens", "i32", "T"), f.param("rows", "i32", "R")
    sampling = f.param("sampling", "sampling", "R")
    x = f.select_rows(f.embed(tokens, f.weight("embed", 4, 32)), rows)
    logits = f.linear(x, f.weight("head", vocab_size, 32))
    graph = finish_graph("sampling", f, logits, f.sample(logits, sampling))
    return replace(graph, functions=(with_f32_weights(graph),))


def with_f32_weights(graph: Graph):
    weights = tuple(replace(w, type=replace(w.type, dtype="f32")) for w in graph.main.weights)
    return replace(graph.main, weights=weights)


def greedy(count: int) -> SampleInput:
    """No row has any wish."""
    zeros, ones = np.zeros(count, np.float32), np.ones(count, np.float32)
    nothing = np.zeros(0, np.int32)
    return SampleInput(
        slots=np.full(count, -1, np.int32),
        temperature=zeros,
        top_k=np.zeros(count, np.int32),
        top_p=ones,
        min_p=zeros,
        repetition_penalty=ones,
        frequency_penalty=zeros,
        presence_penalty=zeros,
        seeds=np.zeros(count, np.uint64),
        positions=np.zeros(count, np.int32),
        history_starts=np.zeros(count + 1, np.int32),
        history_ids=nothing,
        history_counts=nothing,
    )


def warm(count: int, temperature: float = 1.0) -> SampleInput:
    """Every row is drawn, each with a seed of its own."""
    return replace(
        greedy(count),
        temperature=np.full(count, temperature, np.float32),
        seeds=np.arange(count, dtype=np.uint64),
    )


def assert_possible(logits_RV: F32Array, sampling: SampleInput, tokens: I32Array) -> int:
    """Each token follows from its row; gives how many are the reference's very choice."""
    same = 0
    rows = sampling_rows(sampling, logits_RV.shape[1])
    for logits, wishes, token in zip(logits_RV, rows, tokens, strict=True):
        free = replace(
            wishes, bias_ids=np.zeros(0, np.int32), bias_values=np.zeros(0, np.float32),
            is_allowed=None,
        )  # fmt: skip
        assert token in possible_tokens(restrict(logits, wishes), free), wishes
        same += int(token) == sample_row(logits, wishes)
    return same


def random_logits(rng: np.random.Generator, count: int, vocab_size: int) -> F32Array:
    """Rows of several sharpnesses, some with ties, some with logits of -inf."""
    logits = rng.standard_normal((count, vocab_size), np.float32) * rng.choice([0.1, 1, 5, 30])
    if rng.random() < 0.3:
        logits = np.round(logits)
    if rng.random() < 0.3 and vocab_size > 1:
        is_never = rng.random((count, vocab_size)) < 0.5
        is_never[:, rng.integers(vocab_size)] = False
        logits[is_never] = -np.inf
    return logits.astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), vocab_size=st.sampled_from(VOCAB_SIZES))
@pytest.mark.parametrize("row_name", ROW_NAMES)
def test_any_wishes_give_the_reference_s_token(row_name: str, seed: int, vocab_size: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, 6, vocab_size)
    positions = rng.integers(0, 9999, 6).astype(np.int32)
    sampling = random_sampling(
        rng, rng.permutation(SLOTS)[:6].astype(np.int32), positions, vocab_size
    )
    tokens, slots = sampler(pick_row(row_name), vocab_size).run(logits, sampling)
    assert_possible(logits, sampling, tokens)
    np.testing.assert_array_equal(slots[sampling.slots], tokens)


def test_nearly_all_tokens_are_the_reference_s_very_choice(row: Row) -> None:
    rng = np.random.default_rng(0)
    count = 64
    logits = rng.standard_normal((count, 1000), np.float32) * np.float32(3)
    slots = np.full(count, -1, np.int32)
    sampling = random_sampling(rng, slots, np.arange(count, dtype=np.int32), 1000)
    tokens, _ = sampler(row, 1000).run(logits, sampling)
    assert assert_possible(logits, sampling, tokens) >= count - 1


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_greedy_takes_the_lowest_id_of_a_tie(row: Row, vocab_size: int) -> None:
    rng = np.random.default_rng(1)
    logits = rng.integers(-2, 3, (32, vocab_size)).astype(np.float32)
    tokens, _ = sampler(row, vocab_size).run(logits, greedy(32))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


def test_greedy_finds_the_only_logit_there_is(row: Row) -> None:
    logits = np.full((33, 33), -np.inf, np.float32)
    np.fill_diagonal(logits, -50)
    tokens, _ = sampler(row, 33).run(logits, greedy(33))
    np.testing.assert_array_equal(tokens, np.arange(33))
    tokens, _ = sampler(row, 33).run(logits, warm(33))
    np.testing.assert_array_equal(tokens, np.arange(33))


def test_a_row_without_a_slot_leaves_the_slots_alone(row: Row) -> None:
    sampling = replace(greedy(2), slots=np.array([3, -1], np.int32))
    _, slots = sampler(row, 16).run(np.eye(2, 16, dtype=np.float32), sampling)
    np.testing.assert_array_equal(slots, [-1, -1, -1, 0, -1, -1, -1, -1])


@pytest.mark.parametrize("wish", ["top_k", "top_p", "min_p"])
def test_filters_that_leave_one_token_leave_the_likeliest(row: Row, wish: str) -> None:
    logits = np.random.default_rng(2).standard_normal((64, 100), np.float32)
    kinds = {"top_k": np.ones(64, np.int32), "top_p": np.full(64, 1e-6, np.float32)}
    kinds["min_p"] = np.ones(64, np.float32)
    sampling = replace(warm(64, 5.0), **{wish: kinds[wish]})
    tokens, _ = sampler(row, 100).run(logits, sampling)
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


def test_ties_at_the_threshold_of_top_k_are_all_kept(row: Row) -> None:
    logits = np.zeros((400, 33), np.float32)
    logits[:, :4] = 2
    logits[:, 0] = 5
    sampling = replace(warm(400, 10.0), top_k=np.full(400, 2, np.int32))
    tokens, _ = sampler(row, 33).run(logits, sampling)
    assert set(tokens.tolist()) == {0, 1, 2, 3}


def test_a_mask_forbids_and_a_bias_moves(row: Row) -> None:
    rng = np.random.default_rng(3)
    for vocab_size in VOCAB_SIZES[1:]:
        logits = rng.standard_normal((16, vocab_size), np.float32)
        is_allowed = rng.random((2, vocab_size)) < 0.4
        is_allowed[:, 0] = True
        sampling = replace(
            warm(16),
            temperature=np.repeat(np.float32([0, 1]), 8),
            masks=MaskInput(
                rows=np.tile([0, -1, 1, 0], 4).astype(np.int32), words=words(is_allowed)
            ),
            biases=BiasInput(
                starts=np.arange(17, dtype=np.int32),
                ids=rng.integers(0, vocab_size, 16).astype(np.int32),
                values=rng.choice([-np.inf, 2, -2], 16).astype(np.float32),
            ),
        )
        tokens, _ = sampler(row, vocab_size).run(logits, sampling)
        assert_possible(logits, sampling, tokens)


def words(is_allowed_MV: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    """Bit masks; see MaskInput."""
    short = -is_allowed_MV.shape[1] % 32
    bits = np.pad(is_allowed_MV, ((0, 0), (0, short)))
    return np.packbits(bits, axis=1, bitorder="little").view(np.uint32)


def test_tokens_are_drawn_as_often_as_they_are_likely(row: Row) -> None:
    """Pearson's chi-squared over 64,000 draws; its 1e-6 quantile for 9 degrees is 45."""
    logits = np.float32([0, 0.5, 1, -1, 2, 1.5, -0.5, 0.2, 0.1, -2])
    chances = np.exp(logits / 1.3) / np.exp(logits / 1.3).sum()
    counts = np.zeros(10)
    for start in range(0, 64_000, 16_000):
        rows = np.tile(logits, (16_000, 1))
        sampling = replace(warm(16_000, 1.3), seeds=np.arange(16_000, dtype=np.uint64) + start)
        tokens, _ = sampler(row, 10).run(rows, sampling)
        counts += np.bincount(tokens, minlength=10)
    expected = 64_000 * chances
    assert ((counts - expected) ** 2 / expected).sum() < 45


def test_a_draw_depends_on_seed_and_position_and_not_on_the_row(row: Row) -> None:
    logits = np.tile(np.random.default_rng(5).standard_normal(100, np.float32), (64, 1))
    seeds, positions = np.arange(64, dtype=np.uint64), np.arange(64, dtype=np.int32)[::-1].copy()
    one = replace(warm(64), seeds=seeds, positions=positions)
    order = np.random.default_rng(6).permutation(64)
    other = replace(warm(64), seeds=seeds[order], positions=positions[order])
    first, _ = sampler(row, 100).run(logits, one)
    second, _ = sampler(row, 100).run(logits, other)
    np.testing.assert_array_equal(second, first[order])
    assert len(set(first.tolist())) > 10

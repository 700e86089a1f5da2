"""A compiled model that compiles nothing: the interpreter behind the contract of `base.py`."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenmill.backends.base import (
    BLOCK_SIZE,
    BiasInput,
    F32Array,
    I32Array,
    LogprobInput,
    Logprobs,
    MaskInput,
    SampleInput,
    StepInput,
    StepLimits,
    StepOutput,
)
from tokenmill.backends.reference.interpreter import Interpreter, make_caches
from tokenmill.ir.formats import Weight
from tokenmill.ir.graph import Dim, Graph, Type
from tokenmill.ir.low_rank import FACTORS, NO_ADAPTER, FactorSlots, LowRank
from tokenmill.ir.numerics import Place
from tokenmill.ir.sampling import RowSampling, Sampling
from tokenmill.passes.add_adapters import A, B

_NO_TOKENS = np.zeros(0, np.int32)


class ReferenceModel:
    """Runs a graph, before or after any pass, in NumPy: slow, and the measure of the others.

    The graph is a step: `main` takes the tokens `i32[T]`, their `place[T]`, the rows `i32[R]` and
    `sampling[R]`; it returns the logits `f32[R,V]` first, and the sampled tokens `i32[R]` if any.
    Of the V logits the first `limits.vocab_size` belong to tokens. For steps with pooled tokens it
    takes those as `i32[E]` too, or instead of the rows, and returns their states `f32[E,K]`.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, Weight], *, limits: StepLimits) -> None:
        """`weights` by full name; a vector is a Weight of shape [1, K] in f32."""
        self._factors: dict[str, FactorSlots] = {}
        for name, kind in graph.weights().items():
            if kind.dtype in FACTORS:
                self._factors[name] = _no_adapters(name, kind)
            else:
                _check_weight(name, kind, weights[name])
        caches = make_caches(
            graph,
            num_blocks=limits.blocks,
            block_size=BLOCK_SIZE,
            num_window_blocks=limits.window_blocks,
        )
        known: dict[str, Weight | FactorSlots] = {**weights, **self._factors}
        self._interpreter = Interpreter(graph=graph, weights=known, caches=caches)
        self._limits = limits
        self._slots = np.zeros(limits.slots, np.int32)
        self._output: StepOutput | None = None

    @property
    def limits(self) -> StepLimits:
        return self._limits

    def warm_up(self, *, pools: bool = False) -> None:
        """An interpreter has nothing to prepare."""

    def prepare_pooling(self) -> None:
        """The graph that it was given is all that it runs."""

    def post(self, step: StepInput) -> None:
        """Compute the step here and now; `wait` hands it out."""
        assert self._output is None, "a step is in flight already"
        check_step(step, self._limits)
        has_pools = step.window_tables is not None
        kinds = ((step.copies, False), (step.window_copies if has_pools else step.copies, True))
        for copies, is_windowed in kinds:
            for source, target in [] if copies is None else copies.tolist():
                self._interpreter.copy_block(source, target, is_windowed=is_windowed)
        by_type = self._run(step)
        rows = by_type.get(("f32", "R"))
        rows = None if rows is None else rows[:, : self._limits.vocab_size]
        tokens = by_type.get(("i32", "R"))
        if step.sampling is not None:
            assert tokens is not None, "the graph samples nothing"
            kept = step.sampling.slots >= 0
            self._slots[step.sampling.slots[kept]] = tokens[kept]
        logprobs = None
        if step.logprobs is not None:
            assert rows is not None, "the graph gives no logits"
            logprobs = log_softmax(rows, step.logprobs, tokens)
        self._output = StepOutput(
            tokens=tokens,
            logits=rows if step.want_logits else None,
            logprobs=logprobs,
            hidden=None if step.pooled is None else by_type["f32", "E"],
        )

    def wait(self) -> StepOutput:
        assert self._output is not None, "no step is in flight"
        output, self._output = self._output, None
        return output

    def set_adapter(self, slot: int, changes: Mapping[str, LowRank]) -> None:
        assert self._output is None, "a step is in flight"
        assert 0 <= slot < self._limits.adapter_slots, slot
        for name, factor in self._factors.items():
            is_down = name.endswith(A)
            change = changes.get(name.removesuffix(A if is_down else B))
            matrix = None if change is None else change.down_RK if is_down else change.up_NR
            factor.put(slot, matrix)

    def close(self) -> None:
        """There is nothing to end."""

    def _run(self, step: StepInput) -> dict[tuple[str, Dim], Any]:
        """What main returns, the first of each kind, by element type and leading size."""
        main = self._interpreter.graph.main
        found: dict[tuple[str, Dim], Any] = {}
        for name, array in zip(
            main.returns, self._interpreter.run(self._inputs(step)), strict=True
        ):
            kind = main.values[name]
            if array is not None:
                found.setdefault((kind.dtype, kind.shape[0]), array)
        return found

    def _inputs(self, step: StepInput) -> dict[str, object]:
        """What main's parameters take, told apart by their types."""
        place = Place(
            positions_T=step.positions,
            sequences_T=step.sequences,
            blocks_SB=step.block_tables,
            window_blocks_SB=step.window_tables,
            segments_T=step.segments,
            block_size=BLOCK_SIZE,
        )
        by_type = {
            Type("i32", ("T",)): self._tokens(step),
            Type("place", ("T",)): place,
            Type("i32", ("R",)): step.rows,
            Type("i32", ("E",)): _NO_TOKENS if step.pooled is None else step.pooled,
            Type("adapters", ("T",)): _adapters(step),
            Type("sampling", ("R",)): step.sampling and self._sampling(step.sampling),
        }
        return {p.name: by_type[p.type] for p in self._interpreter.graph.main.params}

    def _tokens(self, step: StepInput) -> I32Array:
        is_slot = step.tokens < 0
        return np.where(is_slot, self._slots[np.where(is_slot, -step.tokens - 1, 0)], step.tokens)

    def _sampling(self, sampling: SampleInput) -> Sampling:
        vocab_size = self._limits.vocab_size
        return Sampling(rows=list(sampling_rows(sampling, vocab_size)), vocab_size=vocab_size)


def _no_adapters(name: str, kind: Type) -> FactorSlots:
    slots, *sizes = map(int, kind.shape)
    return FactorSlots(
        rank=sizes[0 if name.endswith(A) else 1],
        matrices=[None] * slots,
        is_rounded=kind.dtype == "lora16",
    )


def _adapters(step: StepInput) -> I32Array:
    none = np.full(len(step.tokens), NO_ADAPTER, np.int32)
    return none if step.adapters is None else step.adapters


def sampling_rows(sampling: SampleInput, vocab_size: int) -> Iterator[RowSampling]:
    """The parameters row by row."""
    for row, (start, stop) in enumerate(pairwise(sampling.history_starts.tolist())):
        bias_ids, bias_values = _row_biases(sampling.biases, row)
        yield RowSampling(
            bias_ids=bias_ids,
            bias_values=bias_values,
            is_allowed=_row_mask(sampling.masks, row, vocab_size),
            temperature=float(sampling.temperature[row]),
            top_k=int(sampling.top_k[row]),
            top_p=float(sampling.top_p[row]),
            min_p=float(sampling.min_p[row]),
            repetition_penalty=float(sampling.repetition_penalty[row]),
            frequency_penalty=float(sampling.frequency_penalty[row]),
            presence_penalty=float(sampling.presence_penalty[row]),
            seed=int(sampling.seeds[row]),
            position=int(sampling.positions[row]),
            history_ids=sampling.history_ids[start:stop],
            history_counts=sampling.history_counts[start:stop],
        )


def _row_biases(biases: BiasInput | None, row: int) -> tuple[I32Array, F32Array]:
    if biases is None:
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    start, stop = biases.starts[row : row + 2]
    return biases.ids[start:stop], biases.values[start:stop]


def _row_mask(masks: MaskInput | None, row: int, vocab_size: int) -> npt.NDArray[np.bool_] | None:
    if masks is None or masks.rows[row] < 0:
        return None
    bits = np.unpackbits(masks.words[masks.rows[row]].view(np.uint8), bitorder="little")
    return bits[:vocab_size].astype(np.bool_)


def log_softmax(logits_RV: F32Array, wanted: LogprobInput, sampled: I32Array | None) -> Logprobs:
    """Log probabilities of the targets and of the most likely tokens."""
    tops = logits_RV.max(axis=1, keepdims=True)
    scores = logits_RV - tops - np.log(np.exp(logits_RV - tops).sum(axis=1, keepdims=True))
    targets = wanted.targets
    if sampled is not None:
        targets = np.where(targets < 0, sampled, targets)
    chosen = np.take_along_axis(scores, targets[:, None], axis=1)
    ids = np.argsort(-logits_RV, axis=1, kind="stable")[:, : wanted.top].astype(np.int32)
    return Logprobs(
        targets=chosen[:, 0],
        ranks=1 + (scores > chosen).sum(axis=1, dtype=np.int32),
        top_ids=ids,
        top=np.take_along_axis(scores, ids, axis=1),
    )


def check_step(step: StepInput, limits: StepLimits) -> None:
    """Assert what `StepInput` promises."""
    num_tokens, tables = len(step.tokens), step.block_tables
    assert 0 < num_tokens <= limits.tokens
    assert len(step.positions) == len(step.sequences) == num_tokens
    assert ((-limits.slots <= step.tokens) & (step.tokens < limits.vocab_size)).all()
    assert tables.shape[0] <= limits.sequences
    assert tables.shape[1] <= limits.blocks_per_sequence
    assert ((tables >= 0) & (tables < limits.blocks)).all()
    assert (step.window_tables is not None) == bool(limits.window_blocks)
    if step.window_tables is not None:
        assert step.window_tables.shape == tables.shape
        assert ((step.window_tables >= 0) & (step.window_tables < limits.window_blocks)).all()
    assert (step.positions >= 0).all()
    assert (step.positions < BLOCK_SIZE * tables.shape[1]).all()
    is_same = np.diff(step.sequences) == 0
    assert set(np.diff(step.sequences).tolist()) <= {0, 1}, "sequences do not lie one by one"
    assert (np.diff(step.positions)[is_same] == 1).all(), "positions do not ascend"
    assert len(step.rows) <= limits.rows
    assert (np.diff(step.rows) > 0).all()
    assert ((step.rows >= 0) & (step.rows < num_tokens)).all()
    if step.pooled is not None:
        assert (np.diff(step.pooled) > 0).all()
        assert ((step.pooled >= 0) & (step.pooled < num_tokens)).all()
    assert step.sampling is None or len(step.sampling.slots) == len(step.rows)
    if step.adapters is not None:
        assert len(step.adapters) == num_tokens
        assert ((step.adapters >= NO_ADAPTER) & (step.adapters < limits.adapter_slots)).all()


def _check_weight(name: str, kind: Type, weight: Weight) -> None:
    """A weight must have the shape that the graph says, and the format once one is chosen."""
    shape = (1, *kind.shape)[-2:]
    if weight.shape != shape or kind.dtype not in ("w", weight.format):
        raise ValueError(f"weight {name} is {weight.format}{list(weight.shape)}, wanted {kind}")

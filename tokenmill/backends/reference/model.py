"""A compiled model that compiles nothing: the interpreter behind the contract of `base.py`."""

from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np

from tokenmill.backends.base import (
    BLOCK_SIZE,
    I32Array,
    SampleInput,
    StepInput,
    StepLimits,
    StepOutput,
)
from tokenmill.backends.reference.interpreter import Interpreter, make_caches
from tokenmill.ir.formats import Weight
from tokenmill.ir.graph import Graph, Type
from tokenmill.ir.numerics import Place
from tokenmill.ir.sampling import RowSampling, Sampling


class ReferenceModel:
    """Runs a graph, before or after any pass, in NumPy: slow, and the measure of the others.

    The graph is a step: `main` takes the tokens `i32[T]`, their `place[T]`, the rows `i32[R]` and
    `sampling[R]`; it returns the logits `f32[R,V]` first, and the sampled tokens `i32[R]` if any.
    Of the V logits the first `limits.vocab_size` belong to tokens.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, Weight], *, limits: StepLimits) -> None:
        """`weights` by full name; a vector is a Weight of shape [1, K] in f32."""
        for name, kind in graph.weights().items():
            _check_weight(name, kind, weights[name])
        caches = make_caches(graph, num_blocks=limits.blocks, block_size=BLOCK_SIZE)
        self._interpreter = Interpreter(graph=graph, weights=weights, caches=caches)
        self._limits = limits
        self._slots = np.zeros(limits.slots, np.int32)
        self._output: StepOutput | None = None

    @property
    def limits(self) -> StepLimits:
        return self._limits

    def post(self, step: StepInput) -> None:
        """Compute the step here and now; `wait` hands it out."""
        assert self._output is None, "a step is in flight already"
        check_step(step, self._limits)
        arrays = [v for v in self._interpreter.run(self._inputs(step)) if v is not None]
        logits = arrays[0][:, : self._limits.vocab_size] if step.want_logits else None
        tokens = next((a for a in arrays if a.dtype == np.int32), None)
        if step.sampling is not None:
            assert tokens is not None, "the graph samples nothing"
            self._slots[step.sampling.slots] = tokens
        self._output = StepOutput(tokens=tokens, logits=logits)

    def wait(self) -> StepOutput:
        assert self._output is not None, "no step is in flight"
        output, self._output = self._output, None
        return output

    def close(self) -> None:
        """There is nothing to end."""

    def _inputs(self, step: StepInput) -> dict[str, object]:
        """What main's parameters take, told apart by their types."""
        place = Place(
            positions_T=step.positions,
            sequences_T=step.sequences,
            blocks_SB=step.block_tables,
            block_size=BLOCK_SIZE,
        )
        by_type = {
            Type("i32", ("T",)): self._tokens(step),
            Type("place", ("T",)): place,
            Type("i32", ("R",)): step.rows,
            Type("sampling", ("R",)): step.sampling and self._sampling(step.sampling),
        }
        return {p.name: by_type[p.type] for p in self._interpreter.graph.main.params}

    def _tokens(self, step: StepInput) -> I32Array:
        is_slot = step.tokens < 0
        return np.where(is_slot, self._slots[np.where(is_slot, -step.tokens - 1, 0)], step.tokens)

    def _sampling(self, sampling: SampleInput) -> Sampling:
        return Sampling(rows=list(sampling_rows(sampling)), vocab_size=self._limits.vocab_size)


def sampling_rows(sampling: SampleInput) -> Iterator[RowSampling]:
    """The parameters row by row."""
    for row, (start, stop) in enumerate(pairwise(sampling.history_starts.tolist())):
        yield RowSampling(
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


def check_step(step: StepInput, limits: StepLimits) -> None:
    """Assert what `StepInput` promises."""
    num_tokens, tables = len(step.tokens), step.block_tables
    assert 0 < num_tokens <= limits.tokens
    assert len(step.positions) == len(step.sequences) == num_tokens
    assert ((-limits.slots <= step.tokens) & (step.tokens < limits.vocab_size)).all()
    assert tables.shape[0] <= limits.sequences
    assert tables.shape[1] <= limits.blocks_per_sequence
    assert ((tables >= 0) & (tables < limits.blocks)).all()
    assert (step.positions >= 0).all()
    assert (step.positions < BLOCK_SIZE * tables.shape[1]).all()
    is_same = np.diff(step.sequences) == 0
    assert set(np.diff(step.sequences).tolist()) <= {0, 1}, "sequences do not lie one by one"
    assert (np.diff(step.positions)[is_same] == 1).all(), "positions do not ascend"
    assert len(step.rows) <= limits.rows
    assert (np.diff(step.rows) > 0).all()
    assert ((step.rows >= 0) & (step.rows < num_tokens)).all()
    assert step.sampling is None or len(step.sampling.slots) == len(step.rows)


def _check_weight(name: str, kind: Type, weight: Weight) -> None:
    """A weight must have the shape that the graph says, and the format once one is chosen."""
    shape = (1, *kind.shape)[-2:]
    if weight.shape != shape or kind.dtype not in ("w", weight.format):
        raise ValueError(f"weight {name} is {weight.format}{list(weight.shape)}, wanted {kind}")

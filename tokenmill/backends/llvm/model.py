"""A compiled model on this machine's processor: posts steps to native workers."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from tokenmill.backends.base import (
    BLOCK_SIZE,
    F32Array,
    I32Array,
    LogprobInput,
    Logprobs,
    SampleInput,
    StepInput,
    StepLimits,
    StepOutput,
)
from tokenmill.backends.llvm.angles import AngleTable
from tokenmill.backends.llvm.context import Context
from tokenmill.backends.llvm.factors import FactorMemory
from tokenmill.backends.llvm.kv_cache import head_bytes, is_windowed
from tokenmill.backends.llvm.lower import Program
from tokenmill.backends.llvm.memory import Arena
from tokenmill.backends.llvm.packing import round_up
from tokenmill.backends.llvm.program import CompiledProgram
from tokenmill.backends.llvm.scope import Buffer
from tokenmill.backends.llvm.variant import Variant
from tokenmill.backends.llvm.weights import PackedWeights, factors_of
from tokenmill.backends.llvm.workers import Workers
from tokenmill.ir.graph import Type
from tokenmill.ir.low_rank import NO_ADAPTER, LowRank
from tokenmill.ir.numerics import Angles
from tokenmill.ir.order import LANES

AnyArray = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

SAMPLE_FIELDS = {
    "slots": "sample_slots",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "seeds": "seeds",
    "positions": "sample_positions",
    "history_starts": "history_starts",
    "history_ids": "history_ids",
    "history_counts": "history_counts",
}
"""Fields of SampleInput, and the context's names for them."""

_NO_TOKENS = np.zeros(0, np.int32)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a step tells of each row's logits; the names are the context's."""

    target_logits: F32Array
    target_ranks: I32Array
    logit_tops: F32Array
    logit_sums: F32Array
    top_ids: I32Array
    top_logits: F32Array

    @staticmethod
    def of(rows: int, top: int) -> "Scores":
        return Scores(
            target_logits=np.zeros(rows, np.float32),
            target_ranks=np.zeros(rows, np.int32),
            logit_tops=np.zeros(rows, np.float32),
            logit_sums=np.zeros(rows, np.float32),
            top_ids=np.zeros((rows, top), np.int32),
            top_logits=np.zeros((rows, top), np.float32),
        )

    def logprobs(self) -> Logprobs:
        """The log of softmax: logit - largest - log(sum of exp(logit - largest))."""
        norms = self.logit_tops + np.log(self.logit_sums)
        return Logprobs(
            targets=self.target_logits - norms,
            ranks=self.target_ranks,
            top_ids=self.top_ids,
            top=self.top_logits - norms[:, None],
        )


class LlvmModel:
    """A program, its packed weights, its KV pool and its workers; see CompiledModel.

    `make_pooling` compiles the program for steps with pooled tokens, which does all that the other
    does too; it is called when the first such step comes. None: the one program does it.
    """

    def __init__(
        self,
        compiled: CompiledProgram,
        packed: PackedWeights,
        weights: Arena,
        *,
        limits: StepLimits,
        threads: int,
        make_pooling: Callable[[], CompiledProgram] | None = None,
    ) -> None:
        program = compiled.program
        self._limits = limits
        self._packed = packed
        self._weights = weights
        self._context = Context()
        self._step: dict[str, AnyArray] = {}
        self._scores = Scores.of(0, 0)
        self._posted: StepInput | None = None
        self._is_closed = False
        self._pools = _pools(program, limits)
        size_bytes = sum(pool.size_bytes for pool in self._pools)
        self._keys, self._values = (Arena(max(size_bytes, 64)) for _ in range(2))
        self._cache_starts = np.cumsum([0, *(p.size_bytes for p in self._pools)], dtype=np.int64)
        self._slots = np.zeros(limits.slots, np.int32)
        self._sampled = np.zeros(limits.rows, np.int32)
        stride = round_up(limits.vocab_size, LANES)
        self._scratch = np.zeros((threads, stride), np.float32)
        self._angles = self._angle_tables(program)
        self._factors = FactorMemory.of(factors_of(program))
        self._plain = self._variant(compiled)
        self._pooling: Variant | None = self._plain if make_pooling is None else None
        self._make_pooling = make_pooling
        self._lock = threading.Lock()
        self._current = self._plain
        self._workers = Workers(threads, compiled.options.row, cache=compiled.objects)
        self._fill_context()

    def _variant(self, compiled: CompiledProgram) -> Variant:
        return Variant(compiled, self._packed, self._weights, self._angles, self._factors)

    def _for_pooling(self) -> Variant:
        with self._lock:  # a server warms up while it runs
            if self._pooling is None:
                assert self._make_pooling is not None
                self._pooling = self._variant(self._make_pooling())
            return self._pooling

    def _angle_tables(self, program: Program) -> dict[Angles, AngleTable]:
        positions = self._limits.blocks_per_sequence * BLOCK_SIZE
        wanted = {e.slot.angles for e in program.entries if e.slot.angles is not None}
        return {key: AngleTable(key, positions) for key in wanted}

    def _fill_context(self) -> None:
        context = self._context
        context["control"] = self._workers.control_address
        context["keys"] = self._keys.address
        context["values"] = self._values.address
        context["vocab"] = self._limits.vocab_size
        context["sample_stride"] = self._scratch.strides[0]
        self._current.enter(context)
        for field, array in (
            ("cache_starts", self._cache_starts),
            ("slots", self._slots),
            ("sampled", self._sampled),
            ("sample_scratch", self._scratch),
        ):
            context.point(field, array)

    @property
    def limits(self) -> StepLimits:
        return self._limits

    def warm_up(self, *, pools: bool = False) -> None:
        self._plain.warm_up(self._limits.tokens)
        if pools:
            self._for_pooling().warm_up(self._limits.tokens)

    def prepare_pooling(self) -> None:
        self._for_pooling()

    def prepare(self, tokens: int) -> None:
        """Have the tile kernels ready that a step of so many tokens needs."""
        self._plain.prepare(tokens)

    def post(self, step: StepInput) -> None:
        assert self._posted is None, "a step is in flight already"
        self._check(step)
        variant = self._plain if step.pooled is None else self._for_pooling()
        num_pooled = 0 if step.pooled is None else len(step.pooled)
        for count in {len(step.tokens), len(step.rows), num_pooled} - {0}:
            variant.prepare(count)
        variant.reset()
        if variant is not self._current:
            variant.enter(self._context)
            self._current = variant
        self._copy_blocks(step)
        for table in self._angles.values():
            table.reach(int(step.positions.max()))
        self._set_step(step)
        self._posted = step
        self._workers.post(variant.step_address, self._context.address)

    def set_adapter(self, slot: int, changes: Mapping[str, LowRank]) -> None:
        assert self._posted is None, "a step is in flight"
        assert 0 <= slot < self._limits.adapter_slots, slot
        self._factors.put(slot, changes)

    def _check(self, step: StepInput) -> None:
        limits = self._limits
        assert step.adapters is None or (step.adapters < limits.adapter_slots).all()
        assert 0 < len(step.tokens) <= limits.tokens, len(step.tokens)
        assert len(step.rows) <= limits.rows, len(step.rows)
        assert step.block_tables.shape[1] <= limits.blocks_per_sequence
        assert (step.window_tables is not None) == bool(limits.window_blocks)

    def _set_step(self, step: StepInput) -> None:
        """Point the context at the step's arrays, which `_step` keeps alive."""
        index, _ = np.divmod(step.positions, BLOCK_SIZE)
        windows = step.block_tables if step.window_tables is None else step.window_tables
        self._step = {
            "tokens": _packed(step.tokens, np.int32),
            "positions": _packed(step.positions, np.int32),
            "sequences": _packed(step.sequences, np.int32),
            "block_tables": _packed(step.block_tables, np.int32),
            "window_tables": _packed(windows, np.int32),
            "token_blocks": _packed(step.block_tables[step.sequences, index], np.int32),
            "window_token_blocks": _packed(windows[step.sequences, index], np.int32),
            "rows": _packed(step.rows, np.int32),
        }
        if self._limits.adapter_slots:
            none = np.full(len(step.tokens), NO_ADAPTER, np.int32)
            adapters = none if step.adapters is None else step.adapters
            self._step["adapters"] = _packed(adapters, np.int32)
        context = self._context
        context["T"], context["R"] = len(step.tokens), len(step.rows)
        context["S"] = len(step.block_tables)
        context["table_stride"] = step.block_tables.shape[1]
        context["is_sampling"] = int(step.sampling is not None)
        if step.sampling is not None:
            self._set_sampling(step.sampling)
        context["is_logprobs"] = int(step.logprobs is not None)
        if step.logprobs is not None:
            self._set_logprobs(step.logprobs)
        if self._current.program.hidden is not None:
            self._set_pooling(step, _NO_TOKENS if step.pooled is None else step.pooled)
        for field, array in self._step.items():
            context.point(field, array)

    def _set_pooling(self, step: StepInput, pooled: I32Array) -> None:
        lengths = np.zeros(len(step.block_tables), np.int32)
        lengths[step.sequences] = step.positions + 1  # the last of each sequence stays
        segments = np.zeros_like(step.tokens) if step.segments is None else step.segments
        self._context["E"] = len(pooled)
        self._step["pooled"] = _packed(pooled, np.int32)
        self._step["lengths"] = lengths
        self._step["segments"] = _packed(segments, np.int32)

    def _set_sampling(self, sampling: SampleInput) -> None:
        for source, field in SAMPLE_FIELDS.items():
            array = getattr(sampling, source)
            self._step[field] = _packed(array, array.dtype)
        count = len(sampling.slots)
        nothing = np.zeros(count + 1, np.int32)
        biases, masks = sampling.biases, sampling.masks
        self._step["bias_starts"] = nothing if biases is None else _packed(biases.starts, np.int32)
        if biases is not None:
            self._step["bias_ids"] = _packed(biases.ids, np.int32)
            self._step["bias_values"] = _packed(biases.values, np.float32)
        self._step["mask_rows"] = nothing - 1 if masks is None else _packed(masks.rows, np.int32)
        if masks is not None:
            self._step["masks"] = _packed(masks.words, np.uint32)
            self._context["mask_words"] = masks.words.shape[1]

    def _set_logprobs(self, wanted: LogprobInput) -> None:
        self._step["logprob_targets"] = _packed(wanted.targets, np.int32)
        self._context["logprob_top"] = wanted.top
        self._scores = Scores.of(len(wanted.targets), wanted.top)
        for field in fields(Scores):
            self._context.point(field.name, getattr(self._scores, field.name))

    def _copy_blocks(self, step: StepInput) -> None:
        """Copy whole blocks in every layer; no step is in flight."""
        has_windows = step.window_tables is not None
        for start, pool in zip(self._cache_starts.tolist(), self._pools, strict=False):
            copies = step.window_copies if has_windows and pool.is_windowed else step.copies
            if copies is None or not pool.size_bytes:
                continue
            for arena in (self._keys, self._values):
                blocks = arena.view(np.uint8, (pool.num_blocks, pool.block_bytes), start)
                for source, target in copies.tolist():
                    blocks[target] = blocks[source]

    def wait(self) -> StepOutput:
        step = self._posted
        assert step is not None, "no step is in flight"
        self._workers.wait()
        self._posted = None
        count = len(step.rows)
        tokens: I32Array | None = None
        if step.sampling is not None:
            tokens = self._sampled[:count].copy()
        return StepOutput(
            tokens=tokens,
            logits=self._read(self._current.program.logits, count) if step.want_logits else None,
            logprobs=self._scores.logprobs() if step.logprobs is not None else None,
            hidden=None if step.pooled is None else self._read_hidden(len(step.pooled)),
        )

    def _read_hidden(self, count: int) -> F32Array:
        return self._read(self._current.program.hidden, count)

    def _read(self, buffer: Buffer | None, count: int) -> F32Array:
        """The first rows of a value; of logits, those of tokens."""
        assert buffer is not None, "the graph does not give it"
        rows = self._current.arena.view(np.float32, (count, buffer.stride // 4), buffer.offset)
        is_logits = buffer is self._current.program.logits
        width = self._limits.vocab_size if is_logits else buffer.type.width
        return rows[:, :width].copy()

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._workers.close()
        variants = {id(v): v for v in (self._plain, self._pooling) if v is not None}
        arenas = (variant.arena for variant in variants.values())
        shared = (self._keys, self._values, self._weights, self._factors.arena)
        for arena in (*arenas, *shared):
            arena.close()


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """The blocks of one layer: keys or values."""

    num_blocks: int
    block_bytes: int
    is_windowed: bool

    @property
    def size_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def _pools(program: Program, limits: StepLimits) -> list[_Pool]:
    """That of each layer, in order."""
    pools = []
    for cache in program.caches:
        has_window = cache is not None and is_windowed(cache)
        own = limits.window_blocks if has_window and limits.window_blocks else limits.blocks
        pools.append(
            _Pool(
                num_blocks=own,
                block_bytes=_block_bytes(program, cache),
                is_windowed=has_window,
            )
        )
    return pools


def _block_bytes(program: Program, cache: Type | None) -> int:
    """Bytes of a block's keys, or of its values, in one layer."""
    if cache is None:
        return 0
    heads, head_dim = map(int, cache.shape[:2])
    return heads * head_bytes(head_dim, program.cache_dtype)


def kv_block_bytes(program: Program) -> tuple[int, int]:
    """Bytes that a block takes, keys and values: in all layers without a window, and with one."""
    sizes = [0, 0]
    for cache in program.caches:
        if cache is not None:
            sizes[is_windowed(cache)] += 2 * _block_bytes(program, cache)
    return sizes[0], sizes[1]


def _packed(array: AnyArray, dtype: npt.DTypeLike) -> AnyArray:
    return np.ascontiguousarray(array, dtype=dtype)

"""A compiled model on this machine's processor: posts steps to native workers."""

from collections.abc import Mapping
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
from tokenmill.backends.llvm.context import Context
from tokenmill.backends.llvm.factors import FactorMemory
from tokenmill.backends.llvm.kv_cache import head_bytes, is_windowed
from tokenmill.backends.llvm.lower import Program
from tokenmill.backends.llvm.memory import Arena
from tokenmill.backends.llvm.packing import round_up
from tokenmill.backends.llvm.program import CompiledProgram
from tokenmill.backends.llvm.target import MOST_TILE_ROWS
from tokenmill.backends.llvm.tiles import rows_per_tile
from tokenmill.backends.llvm.weights import PackedWeights, angle_table, factors_of
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
    """A program, its packed weights, its KV pool and its workers; see CompiledModel."""

    def __init__(
        self,
        compiled: CompiledProgram,
        packed: PackedWeights,
        weights: Arena,
        *,
        limits: StepLimits,
        threads: int,
    ) -> None:
        program = compiled.program
        self._limits = limits
        self._compiled = compiled
        self._weights = weights
        self._context = Context()
        self._step: dict[str, AnyArray] = {}
        self._scores = Scores.of(0, 0)
        self._posted: StepInput | None = None
        self._is_closed = False
        self._arena = Arena(max(program.arena_bytes, 64))
        self._pools = _pools(program, limits)
        size_bytes = sum(pool.size_bytes for pool in self._pools)
        self._keys, self._values = (Arena(max(size_bytes, 64)) for _ in range(2))
        self._cache_starts = np.cumsum([0, *(p.size_bytes for p in self._pools)], dtype=np.int64)
        self._logits = program.logits
        self._tiles = np.zeros((len(program.tiles), MOST_TILE_ROWS), np.int64)
        self._ready_tiles: set[int] = set()
        self._counters = np.zeros((program.num_counters, 8), np.int64)
        self._slots = np.zeros(limits.slots, np.int32)
        self._sampled = np.zeros(limits.rows, np.int32)
        stride = round_up(limits.vocab_size, LANES)
        self._scratch = np.zeros((threads, stride), np.float32)
        self._angles = self._angle_tables(program)
        addresses = {key: int(a.ctypes.data) for key, a in self._angles.items()}
        self._factors = FactorMemory.of(factors_of(program))
        self._table = packed.table(program, weights.address, addresses, self._factors)
        self._workers = Workers(threads, compiled.options.row, cache=compiled.objects)
        self._fill_context(program)

    def _angle_tables(self, program: Program) -> dict[Angles, npt.NDArray[np.float32]]:
        positions = self._limits.blocks_per_sequence * BLOCK_SIZE
        wanted = {e.slot.angles for e in program.entries if e.slot.angles is not None}
        return {key: angle_table(key, positions) for key in wanted}

    def _fill_context(self, program: Program) -> None:
        context = self._context
        context["control"] = self._workers.control_address
        context["arena"] = self._arena.address
        context["keys"] = self._keys.address
        context["values"] = self._values.address
        context["vocab"] = self._limits.vocab_size
        context["sample_stride"] = self._scratch.strides[0]
        for field, array in (
            ("tiles", self._tiles),
            ("weights", self._table),
            ("counters", self._counters),
            ("cache_starts", self._cache_starts),
            ("slots", self._slots),
            ("sampled", self._sampled),
            ("sample_scratch", self._scratch),
        ):
            context.point(field, array)

    @property
    def limits(self) -> StepLimits:
        return self._limits

    def warm_up(self) -> None:
        for num_rows in range(1, min(self._tile_rows, self._limits.tokens) + 1):
            self.prepare(num_rows)

    @property
    def _tile_rows(self) -> int:
        """Rows of the largest tile; steps of more rows need no kernels of their own."""
        return self._compiled.options.row.tile_rows

    def prepare(self, tokens: int) -> None:
        """Have the tile kernels ready that a step of so many tokens needs."""
        size = rows_per_tile(tokens, self._tile_rows)
        wanted = {size, (tokens - 1) % size + 1}
        if self._compiled.program.has_experts:
            wanted |= set(range(1, min(tokens, self._tile_rows) + 1))
        for rows in wanted - self._ready_tiles:
            for kind, address in self._compiled.tile_addresses(rows).items():
                self._tiles[kind, rows - 1] = address
            self._ready_tiles.add(rows)

    def post(self, step: StepInput) -> None:
        assert self._posted is None, "a step is in flight already"
        self._check(step)
        for count in {len(step.tokens), len(step.rows)} - {0}:
            self.prepare(count)
        self._counters[:] = 0
        self._copy_blocks(step)
        self._set_step(step)
        self._posted = step
        self._workers.post(self._compiled.step_address, self._context.address)

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
        for field, array in self._step.items():
            context.point(field, array)

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
            logits=self._read_logits(count) if step.want_logits else None,
            logprobs=self._scores.logprobs() if step.logprobs is not None else None,
        )

    def _read_logits(self, count: int) -> F32Array:
        width = self._logits.stride // 4
        rows = self._arena.view(np.float32, (count, width), self._logits.offset)
        return rows[:, : self._limits.vocab_size].copy()

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._workers.close()
        arenas = (self._arena, self._keys, self._values, self._weights, self._factors.arena)
        for arena in arenas:
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

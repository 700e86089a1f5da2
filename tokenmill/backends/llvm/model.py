"""A compiled model on this machine's processor: posts steps to native workers."""

import numpy as np
import numpy.typing as npt

from tokenmill.backends.base import (
    BLOCK_SIZE,
    F32Array,
    I32Array,
    StepInput,
    StepLimits,
    StepOutput,
)
from tokenmill.backends.llvm.context import Context
from tokenmill.backends.llvm.epilogue import head_bytes
from tokenmill.backends.llvm.lower import Program
from tokenmill.backends.llvm.memory import Arena
from tokenmill.backends.llvm.packing import round_up
from tokenmill.backends.llvm.program import CompiledProgram
from tokenmill.backends.llvm.tiles import MAX_ROWS, rows_per_tile
from tokenmill.backends.llvm.weights import PackedWeights, angle_table
from tokenmill.backends.llvm.workers import Workers
from tokenmill.ir.order import LANES

AnyArray = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

_SAMPLE_FIELDS = {
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
        self._posted: StepInput | None = None
        self._is_closed = False
        self._arena = Arena(max(program.arena_bytes, 64))
        self._keys, self._values = (Arena(self._pool_bytes(program)) for _ in range(2))
        self._logits = program.logits
        self._tiles = np.zeros((len(program.tiles), MAX_ROWS), np.int64)
        self._ready_tiles: set[int] = set()
        self._counters = np.zeros((program.num_counters, 8), np.int64)
        self._slots = np.zeros(limits.slots, np.int32)
        self._sampled = np.zeros(limits.rows, np.int32)
        stride = round_up(limits.vocab_size, LANES)
        self._scratch = np.zeros((threads, stride), np.float32)
        self._angles = self._angle_tables(program)
        addresses = {key: int(a.ctypes.data) for key, a in self._angles.items()}
        self._table = packed.table(program, weights.address, addresses)
        self._workers = Workers(threads, compiled.options.row, cache=compiled.objects)
        self._fill_context(program)

    def _pool_bytes(self, program: Program) -> int:
        """Bytes of the keys of all blocks; those of the values are as many."""
        return self._limits.blocks * kv_block_bytes(program) // 2

    def _angle_tables(self, program: Program) -> dict[tuple[int, float], npt.NDArray[np.float32]]:
        positions = self._limits.blocks_per_sequence * BLOCK_SIZE
        wanted = {e.slot.angles for e in program.entries if e.slot.angles is not None}
        return {key: angle_table(*key, positions) for key in wanted}

    def _fill_context(self, program: Program) -> None:
        context = self._context
        context["control"] = self._workers.control_address
        context["arena"] = self._arena.address
        context["keys"] = self._keys.address
        context["values"] = self._values.address
        layer_bytes = self._pool_bytes(program) // program.num_caches
        context["key_layer_bytes"] = context["value_layer_bytes"] = layer_bytes
        context["vocab"] = self._limits.vocab_size
        context["sample_stride"] = self._scratch.strides[0]
        for field, array in (
            ("tiles", self._tiles),
            ("weights", self._table),
            ("counters", self._counters),
            ("slots", self._slots),
            ("sampled", self._sampled),
            ("sample_scratch", self._scratch),
        ):
            context.point(field, array)

    @property
    def limits(self) -> StepLimits:
        return self._limits

    def prepare(self, tokens: int) -> None:
        """Have the tile kernels ready that a step of so many tokens needs."""
        size = rows_per_tile(tokens)
        wanted = {size, (tokens - 1) % size + 1}
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
        self._set_step(step)
        self._posted = step
        self._workers.post(self._compiled.step_address, self._context.address)

    def _check(self, step: StepInput) -> None:
        limits = self._limits
        assert 0 < len(step.tokens) <= limits.tokens, len(step.tokens)
        assert len(step.rows) <= limits.rows, len(step.rows)
        assert step.block_tables.shape[1] <= limits.blocks_per_sequence

    def _set_step(self, step: StepInput) -> None:
        """Point the context at the step's arrays, which `_step` keeps alive."""
        index, _ = np.divmod(step.positions, BLOCK_SIZE)
        self._step = {
            "tokens": _packed(step.tokens, np.int32),
            "positions": _packed(step.positions, np.int32),
            "sequences": _packed(step.sequences, np.int32),
            "block_tables": _packed(step.block_tables, np.int32),
            "token_blocks": _packed(step.block_tables[step.sequences, index], np.int32),
            "rows": _packed(step.rows, np.int32),
        }
        context = self._context
        context["T"], context["R"] = len(step.tokens), len(step.rows)
        context["S"] = len(step.block_tables)
        context["table_stride"] = step.block_tables.shape[1]
        context["is_sampling"] = int(step.sampling is not None)
        if step.sampling is not None:
            for source, field in _SAMPLE_FIELDS.items():
                array = getattr(step.sampling, source)
                self._step[field] = _packed(array, array.dtype)
        for field, array in self._step.items():
            context.point(field, array)

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
            tokens=tokens, logits=self._read_logits(count) if step.want_logits else None
        )

    def _read_logits(self, count: int) -> F32Array:
        width = self._logits.stride // 4
        rows = self._arena.view(np.float32, (count, width), self._logits.offset)
        return rows[:, : int(self._logits.type.shape[1])].copy()

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._workers.close()
        for arena in (self._arena, self._keys, self._values, self._weights):
            arena.close()


def kv_block_bytes(program: Program) -> int:
    """Bytes that one block takes in all layers, keys and values."""
    heads, head_dim = (int(d) for d in program.cache.shape)
    return 2 * program.num_caches * heads * head_bytes(head_dim, program.cache_dtype)


def _packed(array: AnyArray, dtype: npt.DTypeLike) -> AnyArray:
    return np.ascontiguousarray(array, dtype=dtype)

"""One of the programs that a model runs, with the memory and the tables that are its own."""

from collections.abc import Mapping

import numpy as np

from tokenmill.backends.llvm.angles import AngleTable
from tokenmill.backends.llvm.context import Context
from tokenmill.backends.llvm.factors import FactorMemory
from tokenmill.backends.llvm.memory import Arena
from tokenmill.backends.llvm.program import CompiledProgram
from tokenmill.backends.llvm.target import MOST_TILE_ROWS
from tokenmill.backends.llvm.tiles import rows_per_tile
from tokenmill.backends.llvm.weights import PackedWeights
from tokenmill.ir.numerics import Angles


class Variant:
    """A program's activations, its table of weights, and its tile kernels as they are needed.

    Weights, caches, adapters and sampling slots are the model's: all its variants share them.
    """

    def __init__(
        self,
        compiled: CompiledProgram,
        packed: PackedWeights,
        weights: Arena,
        angles: Mapping[Angles, AngleTable],
        factors: FactorMemory,
    ) -> None:
        program = compiled.program
        self.program = program
        self.step_address = compiled.step_address
        self.arena = Arena(max(program.arena_bytes, 64))
        self._compiled = compiled
        self._table = packed.table(program, weights.address, angles, factors)
        self._tiles = np.zeros((len(program.tiles), MOST_TILE_ROWS), np.int64)
        self._ready: set[int] = set()
        self._counters = np.zeros((program.num_counters, 8), np.int64)

    @property
    def tile_rows(self) -> int:
        """Rows of the largest tile; steps of more rows need no kernels of their own."""
        return self._compiled.options.row.tile_rows

    def prepare(self, tokens: int) -> None:
        """Have the tile kernels ready that a step of so many tokens needs."""
        size = rows_per_tile(tokens, self.tile_rows)
        wanted = {size, (tokens - 1) % size + 1}
        if self.program.has_experts:
            wanted |= set(range(1, min(tokens, self.tile_rows) + 1))
        for rows in wanted - self._ready:
            for kind, address in self._compiled.tile_addresses(rows).items():
                self._tiles[kind, rows - 1] = address
            self._ready.add(rows)

    def warm_up(self, tokens: int) -> None:
        """Have those ready that any step of at most `tokens` needs."""
        for num_rows in range(1, min(self.tile_rows, tokens) + 1):
            self.prepare(num_rows)

    def enter(self, context: Context) -> None:
        """Let the context point here."""
        context["arena"] = self.arena.address
        context.point("tiles", self._tiles)
        context.point("weights", self._table)
        context.point("counters", self._counters)

    def reset(self) -> None:
        """Before each step: no item of a phase is drawn yet."""
        self._counters[:] = 0

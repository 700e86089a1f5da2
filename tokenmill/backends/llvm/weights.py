"""Packed weights: which lie where in one arena, packing them, and keeping them on disk."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenmill.backends.llvm.angles import AngleTable
from tokenmill.backends.llvm.factors import Factor, FactorMemory
from tokenmill.backends.llvm.lower import Program, WeightEntry
from tokenmill.backends.llvm.memory import Arena
from tokenmill.backends.llvm.packing import pack_matrix, pack_vector, round_up
from tokenmill.backends.llvm.scope import Slot
from tokenmill.ir.formats import Weight
from tokenmill.ir.numerics import Angles
from tokenmill.ir.order import GROUP, LANES

_ALIGN = 64
_SLICE_ROWS = 4096
"""Rows packed at a time, which bounds the memory that packing takes."""


@dataclass(frozen=True, kw_only=True)
class PackedWeights:
    """Where each packed weight lies in the arena, by weight and slot."""

    offsets: dict[tuple[str, Slot], int]
    size_bytes: int

    @staticmethod
    def plan(program: Program, shapes: Mapping[str, tuple[int, ...]]) -> "PackedWeights":
        """One place for each weight in each layout that the program asks for."""
        offsets: dict[tuple[str, Slot], int] = {}
        top = 0
        for entry in _model_entries(program):
            key = (entry.name, entry.slot)
            if key not in offsets:
                offsets[key] = top
                top += round_up(packed_bytes(entry.slot, shapes[entry.name]), _ALIGN)
        return PackedWeights(offsets=offsets, size_bytes=top)

    def layout(self) -> str:
        """Says what lies where; two plans of equal layout can share packed weights."""
        return repr(sorted((offset, name, slot) for (name, slot), offset in self.offsets.items()))

    def pack(self, arena: Arena, name: str, weight: Weight) -> None:
        """Pack a weight into every place that it has; one that has none is ignored."""
        for (wanted, slot), offset in self.offsets.items():
            if wanted == name:
                _pack(arena, offset, slot, weight)

    def table(
        self,
        program: Program,
        arena_address: int,
        angles: Mapping[Angles, AngleTable],
        factors: FactorMemory,
    ) -> npt.NDArray[np.int64]:
        """The addresses that a program reads, those of `angles` among them."""
        table = np.zeros(max((e.place for e in program.entries), default=0) + 1, np.int64)
        for entry in program.entries:
            if entry.slot.angles is not None:
                table[entry.place] = angles[entry.slot.angles].address
            elif entry.slot.factor is not None:
                table[entry.place] = factors.address(*factor_key(entry))
            else:
                table[entry.place] = arena_address + self.offsets[entry.name, entry.slot]
        return table


def _model_entries(program: Program) -> Iterable[WeightEntry]:
    return (e for e in program.entries if e.slot.is_models)


def factor_key(entry: WeightEntry) -> tuple[str, Factor]:
    """The full name of the weight that a factor belongs to, and its layout."""
    factor = entry.slot.factor
    assert factor is not None
    prefix = entry.name.removesuffix(entry.slot.name.removeprefix("@"))
    return prefix + factor.weight.removeprefix("@"), factor


def factors_of(program: Program) -> dict[tuple[str, Factor], None]:
    """Every factor that the program reads, once."""
    entries = (e for e in program.entries if e.slot.factor is not None)
    return dict.fromkeys(map(factor_key, entries))


def adapter_bytes(program: Program) -> int:
    """Bytes that the slots for adapters take."""
    return sum(factor.size_bytes for _, factor in factors_of(program))


def packed_bytes(slot: Slot, shape: tuple[int, ...]) -> int:
    """Bytes that a weight of this shape takes in a layout."""
    assert slot.order is not None
    if slot.packing is None:
        return 4 * slot.order.width
    groups = -(-shape[1] // GROUP)
    return slot.order.width // LANES * slot.packing.block_bytes(groups)


def _pack(arena: Arena, offset: int, slot: Slot, weight: Weight) -> None:
    assert slot.order is not None
    rows = slot.order.rows()
    if slot.packing is None:
        packed = pack_vector(weight.dequantize()[0], rows)
        arena.view(np.uint8, (len(packed),), offset)[:] = packed
        return
    block_bytes = slot.packing.block_bytes(-(-weight.shape[1] // GROUP))
    for start in range(0, len(rows), _SLICE_ROWS):
        blocks = pack_matrix(weight, slot.packing, rows[start : start + _SLICE_ROWS])
        place = offset + start // LANES * block_bytes
        arena.view(np.uint8, blocks.shape, place)[:] = blocks

"""From a graph to machine code: passes, lowering, compiling, and the cache around all three.

A second start finds the manifest and the objects on disk and neither lowers nor compiles. Keys
cover the graph's text, the options and the instruction-set row; `cache_key` adds this code itself.
"""

import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tokenmill.backends.llvm.compile import LoadedObject, compile_object, load_object
from tokenmill.backends.llvm.emit import Module
from tokenmill.backends.llvm.factors import Factor
from tokenmill.backends.llvm.lower import Options, Program, WeightEntry, lower
from tokenmill.backends.llvm.objects import ObjectCache, cache_key
from tokenmill.backends.llvm.packing import PACKINGS, RowOrder
from tokenmill.backends.llvm.scope import Buffer, Slot
from tokenmill.backends.llvm.tiles import Tile, emit_tile
from tokenmill.ir.graph import Graph, Type
from tokenmill.ir.numerics import Angles
from tokenmill.ir.text import print_graph
from tokenmill.passes.pipeline import SPMD_PASSES, NamedPass, numeric_passes, run_passes


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """What decides the numbers beside the weights."""

    activations: str = "bf16"
    cache: str = "bf16"


class CompiledProgram:
    """A program with its code: the step, and tile kernels as they are asked for."""

    def __init__(
        self, program: Program, step: LoadedObject, options: Options, objects: ObjectCache
    ):
        self.program = program
        self.options = options
        self._step = step
        self.objects = objects
        self._tiles: dict[int, LoadedObject] = {}
        self._lock = threading.Lock()

    @property
    def step_address(self) -> int:
        return self._step.address("step")

    def tile_addresses(self, rows: int) -> dict[int, int]:
        """Kernels for so many rows, by index of the tile kind; compiled or loaded if need be."""
        kinds = {i: t for i, t in enumerate(self.program.tiles) if self._serves(t, rows)}
        with self._lock:  # a second object would replace the first, whose addresses are in use
            if rows not in self._tiles:
                self._tiles[rows] = load_object(self._tile_object(list(kinds.values()), rows))
        return {i: self._tiles[rows].address(t.symbol(rows)) for i, t in kinds.items()}

    def _serves(self, tile: Tile, rows: int) -> bool:
        """Tiles of two pairs exist for few rows only."""
        return tile.pairs == 1 or rows <= self.options.row.wide_rows

    def _tile_object(self, tiles: list[Tile], rows: int) -> bytes:
        row = self.options.row
        key = cache_key("tiles", *map(repr, tiles), str(rows), row=row)
        return self.objects.get_or_build(
            key, lambda: compile_object(tile_ir(tiles, self.options, rows), row)
        )


def tile_ir(tiles: list[Tile], options: Options, rows: int) -> str:
    """The IR of the kernels for so many rows."""
    module = Module(f"tiles_{rows}")
    for tile in tiles:
        emit_tile(module, options.row, tile, rows)
    return str(module)


def compile_program(
    graph: Graph,
    formats: Mapping[str, str],
    numerics: Numerics,
    options: Options,
    objects: ObjectCache,
) -> CompiledProgram:
    """Compile a model's graph, or load what an earlier start compiled."""
    row = options.row
    parts = [print_graph(graph), json.dumps(dict(formats)), repr(numerics), repr(options)]
    key = cache_key("step", *parts, row=row)
    manifest, code = objects.get(f"{key}-manifest"), objects.get(key)
    if manifest is None or code is None:
        program = lower(optimize(graph, formats, numerics), options)
        code = compile_object(program.ir_text, row)
        objects.put(key, code)
        objects.put(f"{key}-manifest", manifest_of(program))
    else:
        program = read_manifest(manifest)
    return CompiledProgram(program, load_object(code), options, objects)


def optimize(graph: Graph, formats: Mapping[str, str], numerics: Numerics) -> Graph:
    """The graph after all passes of this backend."""
    return run_passes(graph, passes_of(formats, numerics))


def passes_of(formats: Mapping[str, str], numerics: Numerics) -> tuple[NamedPass, ...]:
    """All passes of this backend, in order."""
    passes = numeric_passes(formats=formats, activations=numerics.activations, cache=numerics.cache)
    return (*passes, *SPMD_PASSES)


# -- the manifest: a program without its code, as JSON


def manifest_of(program: Program) -> bytes:
    """Everything that Python needs to run the program's object."""
    fields = {
        "tiles": [asdict(t) for t in program.tiles],
        "entries": [_entry_fields(e) for e in program.entries],
        "arena_bytes": program.arena_bytes,
        "logits": program.logits and _buffer_fields(program.logits),
        "hidden": program.hidden and _buffer_fields(program.hidden),
        "caches": [str(cache) if cache else None for cache in program.caches],
        "num_counters": program.num_counters,
        "cache_dtype": program.cache_dtype,
        "has_experts": program.has_experts,
    }
    return json.dumps(fields).encode()


def read_manifest(data: bytes) -> Program:
    """The program of a manifest; its text is not kept."""
    fields = json.loads(data)
    return Program(
        ir_text="",
        tiles=tuple(Tile(**t) for t in fields["tiles"]),
        entries=tuple(_read_entry(e) for e in fields["entries"]),
        arena_bytes=fields["arena_bytes"],
        logits=fields["logits"] and _read_buffer(fields["logits"]),
        hidden=fields["hidden"] and _read_buffer(fields["hidden"]),
        caches=tuple(Type.parse(text) if text else None for text in fields["caches"]),
        num_counters=fields["num_counters"],
        cache_dtype=fields["cache_dtype"],
        has_experts=fields["has_experts"],
    )


def _entry_fields(entry: WeightEntry) -> list[object]:
    slot = entry.slot
    packing = [slot.packing.format, slot.packing.dot] if slot.packing else None
    order = asdict(slot.order) if slot.order else None
    angles = asdict(slot.angles) if slot.angles else None
    factor = [asdict(slot.factor)] if slot.factor else []
    return [entry.place, entry.name, slot.name, packing, order, angles, *factor]


def _read_entry(fields: list[object]) -> WeightEntry:
    place, name, slot_name, packing, order, angles, *factors = fields
    slot = Slot(
        name=str(slot_name),
        packing=PACKINGS[packing[0], packing[1]] if isinstance(packing, list) else None,
        order=RowOrder(**order) if isinstance(order, dict) else None,
        angles=_read_angles(angles) if isinstance(angles, dict) else None,
        factor=next((_read_factor(f) for f in factors if isinstance(f, dict)), None),
    )
    assert isinstance(place, int)
    return WeightEntry(place=place, name=str(name), slot=slot)


def _read_angles(fields: dict[str, Any]) -> Angles:
    return Angles(frequencies=tuple(fields["frequencies"]), magnitude=fields["magnitude"])


def _read_factor(fields: dict[str, Any]) -> Factor:
    order = fields.pop("order")
    return Factor(**fields, order=RowOrder(**order) if order else None)


def _buffer_fields(buffer: Buffer) -> dict[str, object]:
    return {
        "type": str(buffer.type),
        "order": asdict(buffer.order),
        "is_record": buffer.is_record,
        "offset": buffer.offset,
    }


def _read_buffer(fields: dict[str, object]) -> Buffer:
    order = fields["order"]
    assert isinstance(order, dict)
    return Buffer(
        type=Type.parse(str(fields["type"])),
        order=RowOrder(**order),
        is_record=bool(fields["is_record"]),
        offset=int(str(fields["offset"])),
    )

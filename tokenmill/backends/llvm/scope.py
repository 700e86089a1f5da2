"""What the lowering of every phase shares: where values and weights lie, and the emitters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, cast

from tokenmill.backends.llvm.context import load_field
from tokenmill.backends.llvm.emit import Function, Module, Value
from tokenmill.backends.llvm.factors import Factor
from tokenmill.backends.llvm.lanes import Lanes
from tokenmill.backends.llvm.packing import PAIR_ROWS, Packing, RowOrder, round_up
from tokenmill.backends.llvm.target import Row
from tokenmill.backends.llvm.tiles import Record, Tile
from tokenmill.ir.graph import Node, Type
from tokenmill.ir.numerics import Angles
from tokenmill.ir.order import GROUP


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """Where a value lies: row t at arena + offset + t * stride.

    A value that a linear reads lies as a Record, and so does any rounded one; others lie as
    floats. `routes` and `groups` are words: see lower_experts.py.
    """

    type: Type
    order: RowOrder
    is_record: bool
    offset: int = 0
    max_rows: int = 0

    @property
    def width(self) -> int:
        return self.order.width

    @property
    def record(self) -> Record:
        return Record(self.type.dtype, self.width // GROUP)

    @property
    def stride(self) -> int:
        size = self.record.size if self.is_record else 4 * self.width
        return round_up(size, 64)

    @property
    def size_bytes(self) -> int:
        return self.max_rows * self.stride


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One entry of the table of packed weights: which weight, and how it is laid out.

    `packing` is None for a vector; `angles` is set for a table of rotary angles and `factor` for
    what adapters bring, which are no weights of the model's.
    """

    name: str
    packing: Packing | None = None
    order: RowOrder | None = None
    angles: Angles | None = None
    factor: Factor | None = None

    @property
    def is_models(self) -> bool:
        """Is it a weight that the model's files hold?"""
        return self.angles is None and self.factor is None


@dataclass
class Tables:
    """What a program needs beside its code; grows while it is lowered."""

    num_layers: int  # with main, which counts as one
    tiles: list[Tile] = field(default_factory=list)
    slots: dict[str, list[Slot]] = field(default_factory=dict)
    counters: dict[str, list[str]] = field(default_factory=dict)

    def tile(self, tile: Tile) -> int:
        if tile not in self.tiles:
            self.tiles.append(tile)
        return self.tiles.index(tile)

    def slot(self, function: str, slot: Slot) -> int:
        slots = self.slots.setdefault(function, [])
        if slot not in slots:
            slots.append(slot)
        return slots.index(slot)

    def counter(self, function: str, phase: str) -> int:
        counters = self.counters.setdefault(function, [])
        if phase not in counters:
            counters.append(phase)
        return counters.index(phase)

    @property
    def num_counters(self) -> int:
        return self.num_layers * max(map(len, self.counters.values()), default=0)


@dataclass(frozen=True, kw_only=True)
class Scope:
    """One IR function being lowered, and the native function that is being written."""

    module: Module
    row: Row
    tables: Tables
    name: str
    types: dict[str, Type]
    buffers: dict[str, Buffer]
    summed: frozenset[str]  # rounded values that a linear reads, so that need group sums
    f: Function
    context: Value
    weights: Value  # address of this layer's part of the weight table
    layer: Value  # index of this layer's KV cache

    @property
    def lanes(self) -> Lanes:
        return Lanes(self.f, self.row)

    def within(self, f: Function, context: Value, weights: Value, layer: Value) -> Scope:
        """The same function of the graph, from inside another native function."""
        return replace(self, f=f, context=context, weights=weights, layer=layer)

    def load(self, field_name: str, kind: str = "i64") -> Value:
        return load_field(self.f, self.context, field_name, kind)

    def element(self, field_name: str, index: Value, kind: str = "i32") -> Value:
        """An element of an array that a context field points to."""
        size = {"i32": 4, "i64": 8, "float": 4}[kind]
        return self.f.load(kind, self.load(field_name, "ptr").at(index * size))

    def row_address(self, name: str, index: Value) -> Value:
        """Where row `index` of a value starts."""
        buffer = self.buffers[name]
        return self.load("arena", "ptr").at(buffer.offset).at(index * buffer.stride)

    def weight(self, slot: Slot) -> Value:
        """The address of a packed weight."""
        index = self.tables.slot(self.name, slot)
        return self.f.load("ptr", self.weights.at(8 * index))

    def vector(self, name: str, order: RowOrder | None = None) -> Value:
        """The address of a float32 vector, stored in an order; by default its own."""
        order = order or RowOrder(count=int(self.types[name].shape[0]))
        return self.weight(Slot(name=name, order=order))

    def angles(self, rope: Node) -> Value:
        """The address of a rotation's table of cosines and sines by position."""
        angles = angles_of(rope)
        return self.weight(Slot(name=f"angles.{2 * len(angles.frequencies)}", angles=angles))

    def draw(self, phase: str) -> Value:
        """The next item of a phase that nobody has taken; each layer counts for itself."""
        index = self.layer + self.tables.counter(self.name, phase) * self.tables.num_layers
        counter = self.load("counters", "ptr").at(index * 64)
        return self.f.atomic_add(counter, self.f.const("i64", 1))

    def count(self, name: str) -> Value:
        """How many rows a value has in this step."""
        leading, *others = self.types[name].rows or self.types[name].shape
        assert isinstance(leading, str)
        return self.load(leading) * prod(map(int, others))

    @contextmanager
    def share(self, total: Value) -> Iterator[Value]:
        """Loop over this thread's part of `range(total)`."""
        thread, threads = (self.f.widen(p) for p in self.f.parameters[1:3])
        start = (total * thread) // threads
        stop = (total * (thread + 1)) // threads
        with self.f.loop(start, stop) as index:
            yield index


def angles_of(rope: Node) -> Angles:
    """The angles of a `rope` node, from its attributes."""
    return Angles.of(**cast("dict[str, Any]", dict(rope.attrs)))


def pairs_of(buffer: Buffer) -> int:
    """How many pairs of vectors a row of the value has."""
    return buffer.width // PAIR_ROWS

"""Tile kernels: the dot products of a few activation rows with one or two pairs of blocks.

A tile is an unpacker (how a chunk of a format becomes lanes) times a dot (which instruction).
It keeps one running sum a row and block; the order of each sum is that of `ir/order.py`, the
same for every tile size. The result goes to `out[row][slot][lane]`, SLOTS slots a row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tokenmill.backends.llvm.emit import Function, Module, Value, Variable
from tokenmill.backends.llvm.headers import Scales
from tokenmill.backends.llvm.lanes import F32, I32, Lanes, f8_to_f32
from tokenmill.backends.llvm.packing import PACKINGS, Packing
from tokenmill.backends.llvm.target import Row
from tokenmill.ir.formats import FORMATS
from tokenmill.ir.order import GROUP, LANES

SLOTS = 4
"""Blocks that one tile can serve: two pairs."""
ROW_BYTES = SLOTS * LANES * 4


def rows_per_tile(total: int, most: int) -> int:
    """Cut `total` rows into as few tiles as can be, all but the last of one size."""
    return -(-total // -(-total // most))


Unpacked = Iterator[tuple[int, Value]]
Unpacker = Callable[[Lanes, Value], Unpacked]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What a tile kernel is specialised on."""

    format: str
    dot: str
    groups: int
    pairs: int

    @property
    def packing(self) -> Packing:
        return PACKINGS[self.format, self.dot]

    def symbol(self, rows: int) -> str:
        return f"tile_{self.packing.name}_g{self.groups}_p{self.pairs}_m{rows}"


# -- activation rows


ELEMENT_BYTES = {"f32": 4, "bf16": 2, "int8": 1}


@dataclass(frozen=True)
class Record:
    """A rounded activation row: the elements, then what the groups need.

    [elements: G x GROUP][sums: G f32], and for int8 [scales: G f32][starts: G i32]
    [halves: G x 2 i32], where a group's start is -128 times the sum of its integers (it undoes
    the 128 added to q8 bytes), and a half's is -32 times that of its own.
    """

    dtype: str
    groups: int

    @property
    def sums(self) -> int:
        return self.groups * GROUP * ELEMENT_BYTES[self.dtype]

    @property
    def scales(self) -> int:
        return self.sums + 4 * self.groups

    @property
    def starts(self) -> int:
        return self.scales + 4 * self.groups

    @property
    def halves(self) -> int:
        return self.starts + 4 * self.groups

    @property
    def size(self) -> int:
        return self.halves + 8 * self.groups if self.dtype == "int8" else self.scales


# -- unpackers: a chunk of weights to (offset in k, lanes) in the dot's steps


def _word(f: Function, chunk: Value, index: int) -> Value:
    return f.load(I32, chunk.at(64 * index), 64)


def _words(f: Function, chunk: Value, count: int) -> list[Value]:
    return [_word(f, chunk, i) for i in range(count)]


_NIBBLES = 0x000F000F  # of a word of pairs


def _shifted(word: Value, count: int) -> Value:
    """To the right by `count` bits, to the left if it is negative."""
    return word >> count if count >= 0 else word << -count


def _q4_bf16(lanes: Lanes, chunk: Value) -> Unpacked:
    """A nibble under the exponent of 128 is the bfloat16 128 + nibble."""
    [word] = _words(lanes.f, chunk, 1)
    for pair in range(4):
        yield 2 * pair, ((word >> (4 * pair)) & _NIBBLES) | 0x43004300


def _q5_bf16(lanes: Lanes, chunk: Value) -> Unpacked:
    """The same, with a fifth bit above each nibble. A word is loaded when its turn comes."""
    fifth = _word(lanes.f, chunk, 4)
    word = _word(lanes.f, chunk, 0)
    for pair in range(16):
        if pair % 4 == 0:
            word = _word(lanes.f, chunk, pair // 4)
        low = (word >> (4 * (pair % 4))) & _NIBBLES
        yield 2 * pair, low | (_shifted(fifth, pair - 4) & 0x00100010) | 0x43004300


def _q4_0_bf16(lanes: Lanes, chunk: Value) -> Unpacked:
    [word] = _words(lanes.f, chunk, 1)
    for pair in range(4):
        yield 2 * pair, lanes.bf16_integers(word >> (4 * pair), bits=4, minus=8)


def _q6_bf16(lanes: Lanes, chunk: Value) -> Unpacked:
    upper = _word(lanes.f, chunk, 2)
    word = _word(lanes.f, chunk, 0)
    for pair in range(8):
        if pair % 4 == 0:
            word = _word(lanes.f, chunk, pair // 4)
        low = word >> (4 * (pair % 4))
        joined = (low & _NIBBLES) | (_shifted(upper, 2 * pair - 4) & ~_NIBBLES)
        yield 2 * pair, lanes.bf16_integers(joined, bits=6, minus=32)


def _nibbles_f32(format_name: str, upper_bits: int) -> Unpacker:
    """All formats of nibbles and upper bits, in pairs, as float32."""
    packing, row = PACKINGS[format_name, "f32"], FORMATS[format_name]

    def unpack(lanes: Lanes, chunk: Value) -> Unpacked:
        upper = word = _word(lanes.f, chunk, packing.chunk_bytes // 64 - 1)
        for k in range(packing.chunk_k):
            if k % 8 == 0:
                word = _word(lanes.f, chunk, k // 8)
            quant = (word >> (4 * (k % 8 // 2) + 16 * (k % 2))) & 15
            if upper_bits:
                place = upper_bits * (k // 2) + 16 * (k % 2)
                quant = quant | (((upper >> place) & (2**upper_bits - 1)) << 4)
            if row.lowest:
                quant = quant + row.lowest
            yield k, lanes.f.cast("sitofp", quant, "float")

    return unpack


def _nibbles_int8(format_name: str, upper_bits: int) -> Unpacker:
    """The same, in quads, as unsigned bytes."""
    packing = PACKINGS[format_name, "int8"]
    mask = 0x01010101 * ((2**upper_bits - 1) << 4)

    def unpack(lanes: Lanes, chunk: Value) -> Unpacked:
        upper = word = _word(lanes.f, chunk, packing.chunk_bytes // 64 - 1)
        for quad in range(packing.chunk_k // 4):
            if quad % 2 == 0:
                word = _word(lanes.f, chunk, quad // 2)
            quants = (word >> (4 * (quad % 2))) & 0x0F0F0F0F
            if upper_bits:
                quants = quants | (_shifted(upper, upper_bits * quad - 4) & mask)
            yield 4 * quad, quants

    return unpack


def _q8_plane(lanes: Lanes, chunk: Value, k: int) -> Value:
    quants = lanes.f.load(f"<{LANES} x i8>", chunk.at(LANES * k), LANES)
    return lanes.f.cast("sitofp", lanes.f.cast("sext", quants, "i32"), "float")


def _q8_f32(lanes: Lanes, chunk: Value) -> Unpacked:
    for k in range(8):
        yield k, _q8_plane(lanes, chunk, k)


def _q8_bf16(lanes: Lanes, chunk: Value) -> Unpacked:
    """An 8-bit integer is exact in bfloat16: the top half of its float32."""
    f = lanes.f
    for k in range(0, 8, 2):
        low = f.bitcast(_q8_plane(lanes, chunk, k), I32) >> 16
        high = f.bitcast(_q8_plane(lanes, chunk, k + 1), I32) & -65536
        yield k, low | high


def _q8_int8(lanes: Lanes, chunk: Value) -> Unpacked:
    for index, word in enumerate(_words(lanes.f, chunk, 2)):
        yield 4 * index, word


def _f8_plane(lanes: Lanes, chunk: Value, k: int) -> Value:
    quants = lanes.f.load(f"<{LANES} x i8>", chunk.at(LANES * k), LANES)
    return f8_to_f32(lanes.f, quants)


def _f8_f32(lanes: Lanes, chunk: Value) -> Unpacked:
    for k in range(8):
        yield k, _f8_plane(lanes, chunk, k)


def _f8_bf16(lanes: Lanes, chunk: Value) -> Unpacked:
    """Three bits of mantissa leave the lower half empty."""
    for k in range(0, 8, 2):
        low, high = (lanes.f.bitcast(_f8_plane(lanes, chunk, k + i), I32) for i in range(2))
        yield k, (low >> 16) | high


def _bf16_bf16(lanes: Lanes, chunk: Value) -> Unpacked:
    for index, word in enumerate(_words(lanes.f, chunk, 4)):
        yield 2 * index, word


def _bf16_f32(lanes: Lanes, chunk: Value) -> Unpacked:
    for index, word in enumerate(_words(lanes.f, chunk, 4)):
        yield 2 * index, lanes.f.bitcast(word << 16, F32)
        yield 2 * index + 1, lanes.f.bitcast(word & -65536, F32)


def _f32_f32(lanes: Lanes, chunk: Value) -> Unpacked:
    for k in range(8):
        yield k, lanes.f.load(F32, chunk.at(64 * k), 64)


_UNPACKERS: dict[tuple[str, str], Unpacker] = {
    ("q4", "bf16"): _q4_bf16,
    ("q4_z", "bf16"): _q4_bf16,
    ("q4_k", "bf16"): _q4_bf16,
    ("q5_k", "bf16"): _q5_bf16,
    ("q4_0", "bf16"): _q4_0_bf16,
    ("q6_k", "bf16"): _q6_bf16,
    ("q8", "bf16"): _q8_bf16,
    ("q8", "f32"): _q8_f32,
    ("q8", "int8"): _q8_int8,
    ("f8", "bf16"): _f8_bf16,
    ("f8", "f32"): _f8_f32,
    ("bf16", "bf16"): _bf16_bf16,
    ("bf16", "f32"): _bf16_f32,
    ("f32", "f32"): _f32_f32,
}
_UNPACKERS |= {("q8_z", dot): _UNPACKERS["q8", dot] for dot in ("bf16", "f32", "int8")}
for _names, _upper_bits in ((("q4", "q4_0", "q4_z", "q4_k"), 0), (("q5_k",), 1), (("q6_k",), 2)):
    for _name in _names:
        _UNPACKERS[_name, "f32"] = _nibbles_f32(_name, _upper_bits)
        _UNPACKERS[_name, "int8"] = _nibbles_int8(_name, _upper_bits)

OFFSETS = {(name, "bf16"): 128.0 for name in ("q4", "q4_z", "q4_k", "q5_k")}
"""What an unpacker adds to every weight; the minimum takes it away again."""


# -- dots: one step adds a few neighbours in k


def _dot(lanes: Lanes, tile: Tile, acc: Value, weights: Value, x: Value) -> Value:
    """`x` is the address of the step's activations of one row."""
    f = lanes.f
    if tile.dot == "f32":
        return lanes.fma(weights, lanes.splat(f.load("float", x)), acc)
    neighbours = lanes.splat(f.load("i32", x))
    if tile.dot == "bf16":
        return lanes.dot_bf16(acc, weights, neighbours)
    return lanes.dot_int8(acc, weights, neighbours, bits=tile.packing.bits)


# -- the kernel


class _TileBody:
    """The pieces of one tile kernel while it is emitted: the dots of `rows` rows with `blocks`."""

    def __init__(
        self, lanes: Lanes, tile: Tile, rows: int, blocks: list[Value], out: Value
    ) -> None:
        self.lanes = lanes
        self.f = lanes.f
        self.tile = tile
        self.rows = rows
        self.record = Record(tile.dot, tile.groups)
        self.blocks = blocks
        self.out = out
        self.header = tile.packing.header.reader(lanes, blocks, tile.groups)
        self.parts = GROUP // FORMATS[tile.format].group
        x, stride = self.f.parameters[tile.pairs : tile.pairs + 2]
        self.row_starts = [x.at(stride * i) for i in range(rows)]

    def grid(self, kind: str) -> list[list[Variable]]:
        return [[self.f.variable(kind) for _ in self.blocks] for _ in range(self.rows)]

    def emit(self) -> None:
        sums = self.grid(F32)
        for variable in (v for row in sums for v in row):
            variable.set(0.0)
        with self.header.walk() as group:
            self.prefetch(group)
            for part in range(self.parts):
                dots = self.part_dots(group, part)
                for slot in range(len(self.blocks)):
                    columns = [row[slot] for row in sums], [row[slot] for row in dots]
                    self.add_part(group, part, slot, *columns)
        for i, row in enumerate(sums):
            for slot, variable in enumerate(row):
                self.f.store(variable.get(), self.out.at(i * ROW_BYTES + slot * 64), 64)

    def part_dots(self, group: Value, part: int) -> list[list[Variable]]:
        """The dot of every row and block over one part of a group."""
        packing, inputs = self.tile.packing, GROUP // self.parts
        dots = self.grid(I32 if self.tile.dot == "int8" else F32)
        for row, start in zip(dots, self.row_starts, strict=True):
            for variable in row:
                variable.set(self.first_dot(group, part, start))
        quants = packing.header_bytes(self.tile.groups) + part * packing.group_bytes // self.parts
        places = [b.at(quants).at(group * packing.group_bytes) for b in self.blocks]
        element = ELEMENT_BYTES[self.tile.dot]
        xs = [r.at(part * inputs * element).at(group * (GROUP * element)) for r in self.row_starts]
        chunks = inputs // packing.chunk_k
        if self.rows <= 2 or chunks == 1:
            for index in range(chunks):
                self.chunk_dots(dots, places, xs, self.f.const("i64", index))
        else:
            with self.f.loop(0, chunks) as chunk:
                self.chunk_dots(dots, places, xs, chunk)
        return dots

    def prefetch(self, group: Value) -> None:
        """Bring the same group of the blocks that come next into the second-level cache."""
        packing = self.tile.packing
        ahead = packing.block_bytes(self.tile.groups) * 2 * self.tile.pairs
        for block in self.blocks:
            self.f.prefetch(block.at(ahead).at(group * packing.header.group_bytes()))
            quants = block.at(ahead + packing.header_bytes(self.tile.groups))
            for line in range(0, packing.group_bytes, 64):
                self.f.prefetch(quants.at(group * packing.group_bytes).at(line))

    def first_dot(self, group: Value, part: int, row: Value) -> Value:
        """Zero, or what undoes that int8 quants are unsigned."""
        if self.tile.dot != "int8":
            return self.f.const(F32, 0.0)
        start = row.at(self.record.starts).at(group * 4)
        match self.tile.format:
            case "q8" | "q8_z":
                return self.lanes.splat(self.f.load("i32", start))
            case "q4_0":
                return self.lanes.splat(self.f.load("i32", start).shift_signed(4))
            case "q6_k":
                half = row.at(self.record.halves).at(group * 8).at(4 * part)
                return self.lanes.splat(self.f.load("i32", half))
        return self.f.const(I32, 0)

    def chunk_dots(
        self, dots: list[list[Variable]], places: list[Value], xs: list[Value], chunk: Value
    ) -> None:
        packing, unpack = self.tile.packing, _UNPACKERS[self.tile.format, self.tile.dot]
        element = ELEMENT_BYTES[self.tile.dot]
        starts = [x.at(chunk * (packing.chunk_k * element)) for x in xs]
        steps = zip(
            *(unpack(self.lanes, p.at(chunk * packing.chunk_bytes)) for p in places), strict=True
        )
        for step in steps:
            k = step[0][0]
            for row, start in zip(dots, starts, strict=True):
                x = start.at(k * element)
                for variable, (_, weights) in zip(row, step, strict=True):
                    variable.set(_dot(self.lanes, self.tile, variable.get(), weights, x))

    def add_part(
        self, group: Value, part: int, slot: int, sums: list[Variable], dots: list[Variable]
    ) -> None:
        """acc = fma(scale, dot, acc), then fma(minimum, sum of x, acc); see order.py."""
        f, lanes = self.f, self.lanes
        scale, minimum = self.load_scales(group, part, slot)
        for start, acc, dot in zip(self.row_starts, sums, dots, strict=True):
            value, row_scale = dot.get(), scale
            if self.tile.dot == "int8":
                value = f.cast("sitofp", value, "float")
                x_scale = lanes.splat(f.load("float", start.at(self.record.scales).at(group * 4)))
                row_scale = x_scale if scale is None else scale * x_scale
            total = (
                acc.get() + value if row_scale is None else lanes.fma(row_scale, value, acc.get())
            )
            if minimum is not None:
                x_sum = lanes.splat(f.load("float", start.at(self.record.sums).at(group * 4)))
                total = lanes.fma(minimum, x_sum, total)
            acc.set(total)

    def load_scales(self, group: Value, part: int, slot: int) -> Scales:
        """A part's scale and minimum, as float32 lanes, where the format has them."""
        scale, minimum = self.header.scales(group, part, slot)
        offset = OFFSETS.get((self.tile.format, self.tile.dot))
        if offset is not None and scale is not None and minimum is not None:
            minimum = self.lanes.fma(scale, self.f.const(F32, -offset), minimum)
        return scale, minimum


def emit_tile(module: Module, row: Row, tile: Tile, rows: int) -> Function:
    """The kernel `void tile(pair..., x, stride, out)` for so many rows.

    Few rows take all blocks together, which keeps more loads in flight. More rows take one block
    after the other, so that their dots and their sums stay in registers.
    """
    names = [f"pair{i}" for i in range(tile.pairs)]
    parameters = [(name, "ptr") for name in (*names, "x")] + [("stride", "i64"), ("out", "ptr")]
    f = module.function(tile.symbol(rows), "void", parameters, public=True)
    *pairs, _, _, out = f.parameters
    lanes, size = Lanes(f, row), tile.packing.block_bytes(tile.groups)
    if tile.pairs > 1 or rows <= row.wide_rows:
        blocks = [pair.at(size * i) for pair in pairs for i in range(2)]
        _TileBody(lanes, tile, rows, blocks, out).emit()
    else:
        [pair] = pairs
        with f.loop(0, 2) as index:
            _TileBody(lanes, tile, rows, [pair.at(index * size)], out.at(index * 64)).emit()
    f.ret()
    return f

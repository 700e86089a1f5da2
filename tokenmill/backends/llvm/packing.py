"""How a weight lies in memory, ready for its dot instruction.

Output rows are cut into blocks of LANES: one row a lane. A block holds the scales and minimums of
all its groups, filled up to 64 bytes, and then its quants along k, in chunks:

    block = [header][chunks]
    plain   header [scales: G x LANES][minimums: G x LANES], float16
    K       header, for each SUPER inputs: see `headers.py`

Within a chunk the layout depends on the dot (lane l is output row l of the block):

    q4, pairs   8 inputs: one 32-bit word a lane: k and k + 1 are nibbles of its low and high
                half; pair j takes bits 4j of each half
    q4, quads   8 inputs: one 32-bit word a lane: byte c holds k = c low and k = 4 + c high
    q5          32 inputs: their low nibbles in four words as above, then a word of fifth bits:
                pairs: bit p of each half for pair p; quads: bit i of byte c for k = 4i + c
    q6          16 inputs: two words of nibbles, then one of the two upper bits of each: pairs:
                bits 2p of each half; quads: bits 2i of byte c
    q8, planes  8 inputs: [k][lane] signed bytes, of f8 those of its numbers
    q8, quads   8 inputs: [k / 4][lane][k % 4] bytes, 128 added
    bf16        8 inputs: [k / 2][lane][k % 2];  f32: [k][lane]

q4_0, q4_z and q4_k lie as q4, q8_z as q8; q4_0 and q6_k have 8 and 32 added, so that their quants
are unsigned.
`rows` says which output row each lane takes; -1 is a row of zeros. K is filled up with zeros.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tokenmill.backends.llvm.headers import HEADERS, Header
from tokenmill.ir.formats import FORMATS, Array, Weight
from tokenmill.ir.order import GROUP, LANES, padded_head, stored_dims

PAIR_ROWS = 2 * LANES
_ALIGN = 64

ByteArray = npt.NDArray[np.uint8]


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class Packing:
    """One way to pack one format: inputs and bytes a chunk, and the packer of a chunk array.

    `pack` takes quants [blocks, LANES, chunks, chunk_k] and gives bytes
    [blocks, chunks, chunk_bytes].
    """

    format: str
    dot: str
    chunk_k: int
    chunk_bytes: int
    pack: Callable[[Array], ByteArray] = field(repr=False)

    @property
    def header(self) -> Header:
        return HEADERS[self.format]

    @property
    def bits(self) -> int:
        """Of the largest quant, as the int8 dot takes it."""
        row = FORMATS[self.format]
        return (row.highest - row.lowest).bit_length()

    @property
    def name(self) -> str:
        return f"{self.format}_{self.dot}"

    @property
    def group_bytes(self) -> int:
        """Bytes that the quants of GROUP inputs take."""
        return GROUP // self.chunk_k * self.chunk_bytes

    def header_bytes(self, groups: int) -> int:
        """For so many groups of GROUP inputs."""
        return round_up(self.header.size(groups), _ALIGN)

    def block_bytes(self, groups: int) -> int:
        return self.header_bytes(groups) + groups * self.group_bytes


def _bytes(array: Array, chunk_bytes: int) -> ByteArray:
    flat = np.ascontiguousarray(array).view(np.uint8)
    return flat.reshape(*array.shape[:2], chunk_bytes)


def _pack_q4_pairs(quants: Array) -> ByteArray:
    words = np.zeros((*quants.shape[:1], quants.shape[2], LANES), np.uint32)
    for k in range(quants.shape[3]):
        shift = 4 * (k // 2) + 16 * (k % 2)
        words |= quants[..., k].swapaxes(1, 2).astype(np.uint32) << np.uint32(shift)
    return _bytes(words, 64)


def _pack_q4_quads(quants: Array) -> ByteArray:
    turned = quants.swapaxes(1, 2)
    return _bytes(turned[..., :4] | np.left_shift(turned[..., 4:], 4, dtype=np.uint8), 64)


def _with_high_bits(
    low: Callable[[Array], ByteArray], bits: int, *, are_pairs: bool
) -> Callable[[Array], ByteArray]:
    """Packer of nibbles by `low`, 8 inputs a word, then one word of so many upper bits of each."""

    def pack(quants: Array) -> ByteArray:
        blocks, lanes, chunks, chunk_k = quants.shape
        unsigned = quants.view(np.uint8)
        nibbles = (unsigned & 15).reshape(blocks, lanes, -1, 8)
        words = low(nibbles).reshape(blocks, chunks, -1)
        high = np.zeros((blocks, chunks, lanes), np.uint32)
        for k in range(chunk_k):
            shift = bits * (k // 2) + 16 * (k % 2) if are_pairs else bits * (k // 4) + 8 * (k % 4)
            upper = (unsigned[..., k] >> 4).swapaxes(1, 2).astype(np.uint32)
            high |= upper << np.uint32(shift)
        return np.concatenate([words, _bytes(high, 64)], axis=2)

    return pack


_pack_q5_pairs = _with_high_bits(_pack_q4_pairs, 1, are_pairs=True)
_pack_q5_quads = _with_high_bits(_pack_q4_quads, 1, are_pairs=False)
_pack_q6_pairs = _with_high_bits(_pack_q4_pairs, 2, are_pairs=True)
_pack_q6_quads = _with_high_bits(_pack_q4_quads, 2, are_pairs=False)


def _pack_q8_planes(quants: Array) -> ByteArray:
    return _bytes(quants.transpose(0, 2, 3, 1), 128)


def _pack_q8_quads(quants: Array) -> ByteArray:
    shifted = quants.view(np.uint8) ^ np.uint8(128)
    blocks, lanes, chunks, _ = quants.shape
    quads = shifted.reshape(blocks, lanes, chunks, 2, 4)
    return _bytes(quads.transpose(0, 2, 3, 1, 4), 128)


def _pack_bf16(quants: Array) -> ByteArray:
    blocks, lanes, chunks, _ = quants.shape
    pairs = quants.view(np.uint16).reshape(blocks, lanes, chunks, 4, 2)
    return _bytes(pairs.transpose(0, 2, 3, 1, 4), 256)


def _pack_f32(quants: Array) -> ByteArray:
    return _bytes(quants.transpose(0, 2, 3, 1), 512)


PACKINGS: dict[tuple[str, str], Packing] = {
    (fmt, dot): Packing(format=fmt, dot=dot, chunk_k=inputs, chunk_bytes=size, pack=pack)
    for formats, dots, inputs, size, pack in (
        (("q4", "q4_0", "q4_z", "q4_k"), ("bf16", "f32"), 8, 64, _pack_q4_pairs),
        (("q4", "q4_0", "q4_z", "q4_k"), ("int8",), 8, 64, _pack_q4_quads),
        (("q5_k",), ("bf16", "f32"), 32, 320, _pack_q5_pairs),
        (("q5_k",), ("int8",), 32, 320, _pack_q5_quads),
        (("q6_k",), ("bf16", "f32"), 16, 192, _pack_q6_pairs),
        (("q6_k",), ("int8",), 16, 192, _pack_q6_quads),
        (("q8", "q8_z", "f8"), ("bf16", "f32"), 8, 128, _pack_q8_planes),
        (("q8", "q8_z"), ("int8",), 8, 128, _pack_q8_quads),
        (("bf16",), ("bf16", "f32"), 8, 256, _pack_bf16),
        (("f32",), ("f32",), 8, 512, _pack_f32),
    )
    for fmt in formats
    for dot in dots
}
"""By weight format and activation type."""


def pack_matrix(weight: Weight, packing: Packing, rows: npt.NDArray[np.intp]) -> ByteArray:
    """The blocks of a matrix, [len(rows) / LANES, block_bytes] bytes."""
    k = weight.shape[1]
    groups = -(-k // GROUP)
    blocks = len(rows) // LANES
    quants = np.zeros((len(rows), groups * GROUP), weight.quants.dtype)
    quants[rows >= 0, :k] = weight.quants[rows[rows >= 0]]
    if weight.format in ("q4_0", "q6_k"):
        quants = quants.view(np.uint8) + np.uint8(-FORMATS[weight.format].lowest)
    cells = quants.reshape(blocks, LANES, -1, packing.chunk_k)
    out = np.zeros((blocks, packing.block_bytes(groups)), np.uint8)
    planes = {n: _blocked(p, rows, blocks) for n, p in weight.planes().items()}
    packed = packing.header.pack(planes, groups)
    out[:, : packed.shape[1]] = packed
    out[:, packing.header_bytes(groups) :] = packing.pack(cells).reshape(blocks, -1)
    return out


def _blocked(plane: Array, rows: npt.NDArray[np.intp], blocks: int) -> Array:
    """[N, columns] -> [blocks, columns, LANES], zero where a row is -1."""
    values = np.zeros((len(rows), plane.shape[1]), plane.dtype)
    values[rows >= 0] = plane[rows[rows >= 0]]
    return values.reshape(blocks, LANES, -1).swapaxes(1, 2)


def pack_vector(values: npt.NDArray[np.float32], rows: npt.NDArray[np.intp]) -> ByteArray:
    """A float32 vector in the order of `rows`, zero where a row is -1."""
    out = np.zeros(len(rows), np.float32)
    out[rows >= 0] = values[rows[rows >= 0]]
    return out.view(np.uint8)


@dataclass(frozen=True, kw_only=True)
class RowOrder:
    """The order in which `count` outputs are stored, filled up to whole pairs of blocks.

    With a `head_dim`, they are heads, each in the order of `stored_dims`; without, they lie as
    they come, each of `parts` of them (the experts) filled up by itself.
    """

    count: int
    head_dim: int | None = None
    is_turned: bool = False
    parts: int = 1

    @property
    def width(self) -> int:
        """Stored places, filling included."""
        if self.head_dim is None:
            return self.parts * round_up(self.count // self.parts, PAIR_ROWS)
        return self.count // self.head_dim * padded_head(self.head_dim)

    def rows(self) -> npt.NDArray[np.intp]:
        """The output that each place holds; -1 is filling."""
        if self.head_dim is None:
            rows = np.full((self.parts, self.width // self.parts), -1, np.intp)
            size = self.count // self.parts
            rows[:, :size] = np.arange(self.count).reshape(self.parts, size)
            return rows.reshape(-1)
        dims = stored_dims(self.head_dim, is_turned=self.is_turned)
        starts = np.arange(self.count // self.head_dim)[:, None] * self.head_dim
        return np.where(dims >= 0, starts + dims, -1).reshape(-1)

"""How a weight lies in memory, ready for its dot instruction.

Output rows are cut into blocks of LANES: one row a lane. A block holds, for each group along k,
its scales and minimums (float16, one a lane), and then its quants, CHUNK_K inputs a chunk:

    block = [scales: G x LANES][minimums: G x LANES], filled up to 64 bytes, [chunks: G x 4]

Within a chunk the layout depends on the dot (lane l is output row l of the block):

    q4, pairs   one 32-bit word a lane: k and k + 1 are nibbles of its low and high half;
                pair j takes bits 4j of each half
    q4, quads   one 32-bit word a lane: byte c holds k = c low and k = 4 + c high
    q8, planes  [k][lane] signed bytes
    q8, quads   [k / 4][lane][k % 4] bytes, 128 added
    bf16        [k / 2][lane][k % 2];  f32: [k][lane]

`rows` says which output row each lane takes; -1 is a row of zeros. K is filled up with zeros.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tokenmill.ir.formats import FORMATS, Array, Weight
from tokenmill.ir.order import GROUP, LANES, padded_head, stored_dims

CHUNK_K = 8
CHUNKS = GROUP // CHUNK_K
PAIR_ROWS = 2 * LANES
_ALIGN = 64

ByteArray = npt.NDArray[np.uint8]


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class Packing:
    """One way to pack one format: bytes a chunk, and the packer of a chunk array.

    `pack` takes quants [blocks, LANES, chunks, CHUNK_K] and gives bytes
    [blocks, chunks, chunk_bytes].
    """

    format: str
    dot: str
    chunk_bytes: int
    pack: Callable[[Array], ByteArray] = field(repr=False)

    @property
    def planes(self) -> int:
        """How many float16 planes (scales, minimums) a block starts with."""
        row = FORMATS[self.format]
        return int(row.has_scale) + int(row.has_minimum)

    @property
    def bits(self) -> int:
        """Of the largest quant, as the int8 dot takes it."""
        return 4 if self.format == "q4" else 8

    @property
    def name(self) -> str:
        return f"{self.format}_{self.dot}"

    def header_bytes(self, groups: int) -> int:
        return round_up(groups * LANES * 2 * self.planes, _ALIGN)

    def block_bytes(self, groups: int) -> int:
        return self.header_bytes(groups) + groups * CHUNKS * self.chunk_bytes


def _bytes(array: Array, chunk_bytes: int) -> ByteArray:
    flat = np.ascontiguousarray(array).view(np.uint8)
    return flat.reshape(*array.shape[:2], chunk_bytes)


def _pack_q4_pairs(quants: Array) -> ByteArray:
    words = np.zeros((*quants.shape[:1], quants.shape[2], LANES), np.uint32)
    for k in range(CHUNK_K):
        shift = 4 * (k // 2) + 16 * (k % 2)
        words |= quants[..., k].swapaxes(1, 2).astype(np.uint32) << np.uint32(shift)
    return _bytes(words, 64)


def _pack_q4_quads(quants: Array) -> ByteArray:
    turned = quants.swapaxes(1, 2)
    return _bytes(turned[..., :4] | np.left_shift(turned[..., 4:], 4, dtype=np.uint8), 64)


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
    (fmt, dot): Packing(format=fmt, dot=dot, chunk_bytes=size, pack=pack)
    for fmt, dot, size, pack in (
        ("q4", "bf16", 64, _pack_q4_pairs),
        ("q4", "f32", 64, _pack_q4_pairs),
        ("q4", "int8", 64, _pack_q4_quads),
        ("q8", "bf16", 128, _pack_q8_planes),
        ("q8", "f32", 128, _pack_q8_planes),
        ("q8", "int8", 128, _pack_q8_quads),
        ("bf16", "bf16", 256, _pack_bf16),
        ("bf16", "f32", 256, _pack_bf16),
        ("f32", "f32", 512, _pack_f32),
    )
}
"""By weight format and activation type."""


def pack_matrix(weight: Weight, packing: Packing, rows: npt.NDArray[np.intp]) -> ByteArray:
    """The blocks of a matrix, [len(rows) / LANES, block_bytes] bytes."""
    k = weight.shape[1]
    groups = -(-k // GROUP)
    blocks = len(rows) // LANES
    quants = np.zeros((len(rows), groups * GROUP), weight.quants.dtype)
    quants[rows >= 0, :k] = weight.quants[rows[rows >= 0]]
    cells = quants.reshape(blocks, LANES, groups * CHUNKS, CHUNK_K)
    out = np.zeros((blocks, packing.block_bytes(groups)), np.uint8)
    header = packing.header_bytes(groups)
    out[:, header:] = packing.pack(cells).reshape(blocks, -1)
    planes = [p for p in (weight.scales, weight.minimums) if p is not None]
    for index, plane in enumerate(planes):
        start = index * groups * LANES * 2
        packed = _pack_plane(plane, rows, blocks)
        out[:, start : start + packed.shape[1]] = packed
    return out


def _pack_plane(plane: Array, rows: npt.NDArray[np.intp], blocks: int) -> ByteArray:
    values = np.zeros((len(rows), plane.shape[1]), np.float16)
    values[rows >= 0] = plane[rows[rows >= 0]]
    turned = values.reshape(blocks, LANES, -1).swapaxes(1, 2)
    return np.ascontiguousarray(turned).view(np.uint8).reshape(blocks, -1)


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

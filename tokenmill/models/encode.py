"""Weights as the blocks of ggml: the way back of encodings.py, to the bit.

N rows, B blocks a row, K = B * block_len weights a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from tokenmill.ir.formats import GROUP, SUPER, Array, Weight
from tokenmill.models.encodings import QUANT_ENCODINGS, QuantEncoding
from tokenmill.models.mapped import U8Array


@dataclass(frozen=True, kw_only=True)
class BlockEncoder:
    """How a weight format is written; `file_type` is llama.cpp's LlamaFileType of such a file."""

    encoding: str
    file_type: int
    pack: Callable[[Weight], list[U8Array]]  # the parts of a block in order, each [N, B, bytes]

    @property
    def layout(self) -> QuantEncoding:
        return QUANT_ENCODINGS[self.encoding]

    def size_bytes(self, num_weights: int) -> int:
        return num_weights // self.layout.block_len * self.layout.block_bytes


def encode(weight: Weight) -> U8Array:
    """Blocks [N, bytes a row] of a weight whose rows are a whole number of them."""
    parts = ENCODERS[weight.format].pack(weight)
    return np.concatenate(parts, axis=2).reshape(weight.shape[0], -1)


def _halves(plane: Array | None) -> U8Array:
    """[N, B] float16 -> [N, B, 2] bytes."""
    assert plane is not None
    return np.ascontiguousarray(plane)[..., None].view(np.uint8)


def _quants(weight: Weight, *shape: int) -> U8Array:
    """The quants as bytes, [N, B, *shape]."""
    return np.ascontiguousarray(weight.quants).view(np.uint8).reshape(weight.shape[0], -1, *shape)


def _joined(nibbles: U8Array) -> U8Array:
    """[..., 2, n] -> [..., n]: the first in the low half of a byte, the second above it."""
    low, high = nibbles[..., 0, :] & np.uint8(0x0F), nibbles[..., 1, :] << np.uint8(4)
    joined: U8Array = low | high
    return joined


def _pack_q8_0(weight: Weight) -> list[U8Array]:
    return [_halves(weight.scales), _quants(weight, GROUP)]


def _pack_q4_0(weight: Weight) -> list[U8Array]:
    return [_halves(weight.scales), _joined(_quants(weight, 2, GROUP // 2) + np.uint8(8))]


def _pack_q4_1(weight: Weight) -> list[U8Array]:
    quants = _joined(_quants(weight, 2, GROUP // 2))
    return [_halves(weight.scales), _halves(weight.minimums), quants]


def _pack_q45_k(weight: Weight, *, has_fifth_bit: bool) -> list[U8Array]:
    """encodings.py draws the factors; nibbles of two groups share 32 bytes."""
    assert weight.minimums is not None
    minimums = np.negative(weight.minimums.astype(np.float16, copy=False))  # files subtract them
    heads = [_halves(weight.scales), _halves(minimums), _packed_factors(weight)]
    quants = _quants(weight, SUPER // GROUP, GROUP)
    if has_fifth_bit:
        heads.append(np.packbits(quants >> 4, axis=2, bitorder="little")[:, :, 0])
    nibbles = _joined(quants.reshape(*quants.shape[:2], SUPER // GROUP // 2, 2, GROUP))
    return [*heads, nibbles.reshape(*quants.shape[:2], -1)]


def _packed_factors(weight: Weight) -> U8Array:
    """[N, B, 12] bytes of the 6-bit factors of 8 groups."""
    assert weight.scale_factors is not None
    assert weight.minimum_factors is not None
    planes = (weight.scale_factors, weight.minimum_factors)
    scales, minimums = (p.view(np.uint8).reshape(len(p), -1, SUPER // GROUP) for p in planes)
    first, second = (p[..., :4] | (p[..., 4:] >> 4 << 6) for p in (scales, minimums))
    low = (scales[..., 4:] & 0x0F) | (minimums[..., 4:] << 4)
    return np.concatenate((first, second, low), axis=2)


def _pack_q6_k(weight: Weight) -> list[U8Array]:
    assert weight.scale_factors is not None
    quants = _quants(weight, 2, 4, 32) + np.uint8(32)  # halves of four quarters
    n, b, *_ = quants.shape
    nibbles = _joined(quants.reshape(n, b, 2, 2, 64))
    pairs = np.zeros((n, b, 2, 32), np.uint8)
    for quarter in range(4):
        pairs |= quants[:, :, :, quarter] >> 4 << 2 * quarter
    factors = np.ascontiguousarray(weight.scale_factors).view(np.uint8).reshape(n, b, -1)
    return [nibbles.reshape(n, b, -1), pairs.reshape(n, b, -1), factors, _halves(weight.scales)]


ENCODERS: dict[str, BlockEncoder] = {
    "q8": BlockEncoder(encoding="Q8_0", file_type=7, pack=_pack_q8_0),
    "q6_k": BlockEncoder(encoding="Q6_K", file_type=18, pack=_pack_q6_k),
    "q5_k": BlockEncoder(
        encoding="Q5_K", file_type=16, pack=partial(_pack_q45_k, has_fifth_bit=True)
    ),
    "q4": BlockEncoder(encoding="Q4_1", file_type=3, pack=_pack_q4_1),
    "q4_k": BlockEncoder(
        encoding="Q4_K", file_type=14, pack=partial(_pack_q45_k, has_fifth_bit=False)
    ),
    "q4_0": BlockEncoder(encoding="Q4_0", file_type=2, pack=_pack_q4_0),
}
"""By the format that a file shall have."""

NARROWER_ROWS = {"q6_k": "q8", "q5_k": "q8", "q4_k": "q4"}
"""What takes the place of a format of blocks of 256 where rows are a multiple of 32 only."""

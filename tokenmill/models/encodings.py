"""How weights are encoded in files, and how each encoding is decoded.

A quantised row is a run of blocks; a block holds a few scales and the quants of 32 or 256
weights, laid out as ggml defines them (github.com/ggml-org/ggml, src/ggml-common.h). Unpacking
undoes the layout and rounds nothing. N rows, B blocks a row, K = B * block_len weights a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tokenmill.ir.formats import Weight
from tokenmill.models.mapped import U8Array

Array = npt.NDArray[np.generic]
F16Array = npt.NDArray[np.float16]
F32Array = npt.NDArray[np.float32]

_T = TypeVar("_T", bound=np.generic)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class QuantEncoding:
    """A block encoding, and the weight format that holds it exactly."""

    block_len: int
    block_bytes: int
    format: str
    unpack: Callable[[U8Array], Weight]  # from [N, B, block_bytes]


def _half(blocks: U8Array, start: int) -> F16Array:
    """The float16 at byte `start` of each block, [N, B]."""
    halves: F16Array = np.ascontiguousarray(blocks[:, :, start : start + 2]).view("<f2")
    return halves[:, :, 0]


def _nibbles(packed: U8Array) -> U8Array:
    """[..., n] bytes -> [..., 2, n]: the low halves, then the high halves."""
    packed = np.ascontiguousarray(packed)
    quants = np.empty((*packed.shape[:-1], 2, packed.shape[-1]), dtype=np.uint8)
    quants[..., 0, :] = packed & 0x0F
    quants[..., 1, :] = packed >> 4
    return quants


def _rows(blocks: npt.NDArray[_T]) -> npt.NDArray[_T]:
    """[N, B, ...] -> [N, everything of a row]."""
    return blocks.reshape(blocks.shape[0], -1)


def _unpack_q8_0(blocks: U8Array) -> Weight:
    quants = np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8)
    return Weight(format="q8", quants=_rows(quants), scales=_half(blocks, 0))


def _unpack_q4_0(blocks: U8Array) -> Weight:
    quants = _nibbles(blocks[:, :, 2:]).view(np.int8) - np.int8(8)
    return Weight(format="q4_0", quants=_rows(quants), scales=_half(blocks, 0))


def _unpack_q4_1(blocks: U8Array) -> Weight:
    return Weight(
        format="q4",
        quants=_rows(_nibbles(blocks[:, :, 4:])),
        scales=_half(blocks, 0),
        minimums=_half(blocks, 2),
    )


def _unpack_q5_0(blocks: U8Array) -> Weight:
    fifth = np.unpackbits(blocks[:, :, 2:6], axis=2, bitorder="little")
    quants = _nibbles(blocks[:, :, 6:]).reshape(fifth.shape) | (fifth << 4)
    centred = quants.view(np.int8) - np.int8(16)
    return Weight(format="q8", quants=_rows(centred), scales=_half(blocks, 0))


def _k_planes(blocks: U8Array) -> dict[str, Array]:
    """Scales and minimums of Q4_K and Q5_K, and their 6-bit factors, packed into bytes 4 to 15.

    Factors 0-3 lie in the low 6 bits of bytes 0-3 (scales) and 4-7 (minimums). Factors 4-7
    have their low half in bytes 8-11 (scale low nibble, minimum high nibble) and their
    upper two bits on top of those bytes 0-3 and 4-7.
    """
    first, second, low = (blocks[:, :, i : i + 4] for i in (4, 8, 12))
    scales = np.concatenate((first & 0x3F, (low & 0x0F) | (first >> 6 << 4)), axis=2)
    minimums = np.concatenate((second & 0x3F, (low >> 4) | (second >> 6 << 4)), axis=2)
    return {
        "scales": _half(blocks, 0),
        "minimums": -_half(blocks, 2),  # the file subtracts them
        "scale_factors": _rows(scales),
        "minimum_factors": _rows(minimums),
    }


def _unpack_q4_k(blocks: U8Array) -> Weight:
    quants = _nibbles(blocks[:, :, 16:].reshape(*blocks.shape[:2], 4, 32))
    return Weight(format="q4_k", quants=_rows(quants), **_k_planes(blocks))


def _unpack_q5_k(blocks: U8Array) -> Weight:
    quants = _nibbles(blocks[:, :, 48:].reshape(*blocks.shape[:2], 4, 32))
    fifth = np.ascontiguousarray(blocks[:, :, 16:48])  # bit i belongs to group i
    for group in range(8):
        quants[:, :, group // 2, group % 2] |= (fifth >> group & 1) << 4
    return Weight(format="q5_k", quants=_rows(quants), **_k_planes(blocks))


def _unpack_q6_k(blocks: U8Array) -> Weight:
    """Two halves of 128 weights, each 64 bytes of low nibbles and 32 of upper bit pairs."""
    n, b, _ = blocks.shape
    quants = _nibbles(blocks[:, :, :128].reshape(n, b, 2, 64)).reshape(n, b, 2, 4, 32)
    pairs = np.ascontiguousarray(blocks[:, :, 128:192]).reshape(n, b, 2, 32)
    for quarter in range(4):
        quants[:, :, :, quarter] |= (pairs >> 2 * quarter & 3) << 4
    return Weight(
        format="q6_k",
        quants=_rows(quants.view(np.int8) - np.int8(32)),
        scales=_half(blocks, 208),
        scale_factors=_rows(np.ascontiguousarray(blocks[:, :, 192:208]).view(np.int8)),
    )


QUANT_ENCODINGS = {
    "Q4_0": QuantEncoding(block_len=32, block_bytes=18, format="q4_0", unpack=_unpack_q4_0),
    "Q4_1": QuantEncoding(block_len=32, block_bytes=20, format="q4", unpack=_unpack_q4_1),
    "Q5_0": QuantEncoding(block_len=32, block_bytes=22, format="q8", unpack=_unpack_q5_0),
    "Q8_0": QuantEncoding(block_len=32, block_bytes=34, format="q8", unpack=_unpack_q8_0),
    "Q4_K": QuantEncoding(block_len=256, block_bytes=144, format="q4_k", unpack=_unpack_q4_k),
    "Q5_K": QuantEncoding(block_len=256, block_bytes=176, format="q5_k", unpack=_unpack_q5_k),
    "Q6_K": QuantEncoding(block_len=256, block_bytes=210, format="q6_k", unpack=_unpack_q6_k),
}

FLOAT_ENCODINGS = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
}

REQUANTIZED_ENCODINGS = (
    *("Q5_1", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS"),
    *("IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4"),
)
"""Encodings that are dequantised by `gguf.quants`, slowly, and rounded to q8 or q4."""

"""Packed weights hold what the docstring of packing.py says, whatever the shape and the order."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from tokenmill.backends.llvm.packing import (
    PACKINGS,
    PAIR_ROWS,
    Packing,
    RowOrder,
    pack_matrix,
    pack_vector,
)
from tokenmill.ir.formats import FORMATS, SUPER, Weight, quantize
from tokenmill.ir.order import GROUP, LANES

Bytes = npt.NDArray[np.uint8]
Quants = npt.NDArray[np.generic]
Unpack = Callable[[Bytes], Quants]

SHAPES = ((1, 1), (16, 32), (17, 33), (32, 64), (5, 100), (70, 31), (3, 600))


def pair_bits(words: Quants, k: int, bits: int) -> Quants:
    """Bits of input k in words [LANES] whose halves hold even and odd inputs."""
    return (words >> (bits * (k // 2) + 16 * (k % 2))) & (2**bits - 1)


def quad_bits(words: Quants, k: int, bits: int) -> Quants:
    """Bits of input k in words [LANES] whose bytes hold neighbours of four."""
    return (words >> (bits * (k // 4) + 8 * (k % 4))) & (2**bits - 1)


def nibbles(bits_of: Callable[[Quants, int, int], Quants], count: int, upper: int = 0) -> Unpack:
    """Quants in words of 8 nibbles, and a last word of their upper bits."""

    def unpack(chunk: Bytes) -> Quants:
        words = chunk.view(np.uint32).reshape(-1, LANES)
        quants = [bits_of(words[k // 8], k % 8, 4) for k in range(count)]
        if upper:
            quants = [q | bits_of(words[-1], k, upper) << 4 for k, q in enumerate(quants)]
        return np.stack(quants, axis=1).astype(np.uint8)

    return unpack


def q8_quads(chunk: Bytes) -> Quants:
    quads = chunk.reshape(2, LANES, 4).swapaxes(0, 1).reshape(LANES, 8)
    return (quads.astype(np.int16) - 128).astype(np.int8)


def bf16_pairs(chunk: Bytes) -> Quants:
    pairs = chunk.view(ml_dtypes.bfloat16).reshape(4, LANES, 2)
    return pairs.swapaxes(0, 1).reshape(LANES, 8)


def planes(dtype: type) -> Unpack:
    return lambda chunk: chunk.view(dtype).reshape(8, LANES).T


UNPACKERS: dict[tuple[str, str], Unpack] = {
    **{(name, dot): planes(np.int8) for name in ("q8", "q8_z") for dot in ("bf16", "f32")},
    **{(name, "int8"): q8_quads for name in ("q8", "q8_z")},
    **{("f8", dot): planes(ml_dtypes.float8_e4m3fn) for dot in ("bf16", "f32")},
    ("bf16", "bf16"): bf16_pairs,
    ("bf16", "f32"): bf16_pairs,
    ("f32", "f32"): planes(np.float32),
}
"""A chunk of bytes to quants [LANES, chunk_k], written down from the docstring of packing.py."""

for name, inputs, high in (
    *((name, 8, 0) for name in ("q4", "q4_0", "q4_z", "q4_k")),
    ("q5_k", 32, 1),
    ("q6_k", 16, 2),
):
    UNPACKERS[name, "int8"] = nibbles(quad_bits, inputs, high)
    UNPACKERS[name, "bf16"] = UNPACKERS[name, "f32"] = nibbles(pair_bits, inputs, high)

ADDED = {"q4_0": 8, "q6_k": 32}


def unpack_header(packing: Packing, header: Bytes, groups: int) -> dict[str, Quants]:
    """Planes [LANES, columns] of one block, written down from the docstring of headers.py."""
    row = FORMATS[packing.format]
    if packing.format == "f8":
        records = -(-groups // 4)
        return {"scales": header[: 64 * records].view(np.float32).reshape(records, LANES).T}
    if row.has_zero:
        halves, zeros = np.split(header[: 3 * groups * LANES], [2 * groups * LANES])
        scales = halves.view(np.float16).reshape(groups, LANES).T
        return {"scales": scales, "zeros": zeros.view(row.quant_dtype).reshape(groups, LANES).T}
    if row.factor_dtype is None:
        count = int(row.has_scale) + int(row.has_minimum)
        planes = header[: 2 * count * groups * LANES].view(np.float16)
        found = planes.reshape(count, groups, LANES).swapaxes(1, 2)
        return dict(zip(("scales", "minimums"), found, strict=False))
    per_super, records = SUPER // row.group, -(-groups // (SUPER // GROUP))
    size = 256 if row.has_minimum else 288
    cells = header[: records * size].reshape(records, size)
    shared = cells[:, size - 64 :].copy().view(np.float16).reshape(records, 2, LANES)
    if not row.has_minimum:
        factors = cells[:, :256].view(np.int8).reshape(records * per_super, LANES).T
        return {"scales": shared[:, 1].T, "scale_factors": factors}
    low = cells[:, :192].reshape(records, 3, 1, 4, LANES)
    scale, minimum, upper = np.concatenate([low & 15, low >> 4], axis=2).swapaxes(0, 1)
    factors = (scale | (upper & 3) << 4, minimum | upper >> 2 << 4)
    flat = [f.reshape(records * per_super, LANES).T for f in factors]
    return {
        "scales": shared[:, 0].T,
        "minimums": shared[:, 1].T,
        "scale_factors": flat[0],
        "minimum_factors": flat[1],
    }


def unpack(blocks: Bytes, packing: Packing, k: int) -> Weight:
    """The weight [len(blocks) * LANES, k] in packed blocks."""
    groups = -(-k // GROUP)
    row = FORMATS[packing.format]
    quants = np.empty(
        (len(blocks), LANES, groups * GROUP), np.int16 if row.is_integer else np.float32
    )
    n = len(blocks) * LANES
    planes = {name: np.empty(shape, dtype) for name, (shape, dtype) in row.planes(n, k).items()}
    for index, block in enumerate(blocks):
        header = unpack_header(packing, block[: packing.header_bytes(groups)], groups)
        for name, plane in planes.items():
            plane[index * LANES : (index + 1) * LANES] = header[name][:, : plane.shape[1]]
        chunks = block[packing.header_bytes(groups) :].reshape(-1, packing.chunk_bytes)
        for number, chunk in enumerate(chunks):
            start = number * packing.chunk_k
            found = UNPACKERS[packing.format, packing.dot](chunk.copy())
            quants[index, :, start : start + packing.chunk_k] = found
    quants -= ADDED.get(packing.format, 0)
    flat = quants.reshape(n, -1)[:, :k].astype(row.quant_dtype)
    return Weight(format=packing.format, quants=flat, **planes)


def random_weight(format_name: str, shape: tuple[int, int]) -> Weight:
    rng = np.random.default_rng(shape)
    return quantize(rng.standard_normal(shape, np.float32), format_name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=lambda p: p.name)
def test_what_is_packed_is_all_there(packing: Packing, shape: tuple[int, int]) -> None:
    weight = random_weight(packing.format, shape)
    rows = RowOrder(count=shape[0]).rows()
    found = unpack(pack_matrix(weight, packing, rows), packing, shape[1])
    np.testing.assert_array_equal(found.dequantize()[: shape[0]], weight.dequantize())
    np.testing.assert_array_equal(found.quants[: shape[0]], weight.quants)


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=lambda p: p.name)
def test_rows_may_lie_in_any_order_and_filling_is_zero(packing: Packing) -> None:
    weight = random_weight(packing.format, (40, 50))
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.permutation(40), np.full(24, -1)])
    rng.shuffle(rows)
    found = unpack(pack_matrix(weight, packing, rows), packing, 50).dequantize()
    np.testing.assert_array_equal(found[rows >= 0], weight.dequantize()[rows[rows >= 0]])
    assert not found[rows < 0].any()


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=lambda p: p.name)
def test_slices_of_rows_are_packed_like_the_whole(packing: Packing) -> None:
    weight = random_weight(packing.format, (96, 40))
    rows = RowOrder(count=96).rows()
    whole = pack_matrix(weight, packing, rows)
    parts = [pack_matrix(weight, packing, rows[i : i + 32]) for i in range(0, 96, 32)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=lambda p: p.name)
def test_inputs_beyond_k_are_filled_up_with_zeros(packing: Packing) -> None:
    """So that whatever an activation row holds beyond its end counts nothing."""
    weight = random_weight(packing.format, (16, 33))
    blocks = pack_matrix(weight, packing, RowOrder(count=16).rows()[:16])
    assert not unpack(blocks, packing, 64).quants[:, 33:].any()


@pytest.mark.parametrize(
    ("name", "file_bytes"),
    [("q4_0", 18 * 8), ("q8", 34 * 8), ("q4_k", 144), ("q5_k", 176), ("q6_k", 210)],
)
@pytest.mark.parametrize("dot", ["bf16", "int8"])
def test_a_block_takes_no_more_bytes_than_the_file(name: str, file_bytes: int, dot: str) -> None:
    """By SUPER inputs of LANES rows, as ggml has them."""
    assert PACKINGS[name, dot].block_bytes(16) == 2 * LANES * file_bytes


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=lambda p: p.name)
@pytest.mark.parametrize("groups", [1, 3, 18])
def test_blocks_and_their_quants_are_aligned(packing: Packing, groups: int) -> None:
    assert packing.block_bytes(groups) % 64 == 0
    assert packing.header_bytes(groups) % 64 == 0


def test_a_vector_lies_in_the_order_of_the_rows() -> None:
    rows = np.array([2, -1, 0, 1, -1])
    packed = pack_vector(np.float32([1, 2, 3]), rows).view(np.float32)
    np.testing.assert_array_equal(packed, [3, 0, 1, 2, 0])


@pytest.mark.parametrize("head_dim", [2, 6, 32, 48, 64, 80, 128])
@pytest.mark.parametrize("is_turned", [False, True])
def test_heads_hold_each_output_once(head_dim: int, is_turned: bool) -> None:
    order = RowOrder(count=3 * head_dim, head_dim=head_dim, is_turned=is_turned)
    rows = order.rows()
    assert len(rows) == order.width
    assert order.width % PAIR_ROWS == 0
    assert sorted(rows[rows >= 0]) == list(range(3 * head_dim))


@pytest.mark.parametrize("head_dim", [2, 6, 32, 48, 64, 128])
def test_both_ends_of_a_turning_pair_lie_in_one_lane(head_dim: int) -> None:
    """Dimension d in an even vector, d + D/2 in the same lane of the next one."""
    rows = RowOrder(count=head_dim, head_dim=head_dim, is_turned=True).rows()
    low, high = rows.reshape(-1, 2, LANES).swapaxes(0, 1)
    is_used = low >= 0
    np.testing.assert_array_equal(is_used, high >= 0)
    np.testing.assert_array_equal(high[is_used], low[is_used] + head_dim // 2)

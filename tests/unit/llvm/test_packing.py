"""Packed weights hold what the docstring of packing.py says, whatever the shape and the order."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from tokenmill.backends.llvm.packing import (
    CHUNK_K,
    CHUNKS,
    PACKINGS,
    PAIR_ROWS,
    Packing,
    RowOrder,
    pack_matrix,
    pack_vector,
)
from tokenmill.ir.formats import FORMATS, Weight, quantize
from tokenmill.ir.order import GROUP, LANES

Bytes = npt.NDArray[np.uint8]
Quants = npt.NDArray[np.generic]

SHAPES = ((1, 1), (16, 32), (17, 33), (32, 64), (5, 100), (70, 31))


def q4_pairs(chunk: Bytes) -> Quants:
    words = chunk.view(np.uint32)
    nibbles = [(words >> (4 * (k // 2) + 16 * (k % 2))) & 15 for k in range(CHUNK_K)]
    return np.stack(nibbles, axis=1).astype(np.uint8)


def q4_quads(chunk: Bytes) -> Quants:
    quads = chunk.reshape(LANES, 4)
    return np.concatenate([quads & 15, quads >> 4], axis=1)


def q8_quads(chunk: Bytes) -> Quants:
    quads = chunk.reshape(CHUNK_K // 4, LANES, 4).swapaxes(0, 1).reshape(LANES, CHUNK_K)
    return (quads.astype(np.int16) - 128).astype(np.int8)


def bf16_pairs(chunk: Bytes) -> Quants:
    pairs = chunk.view(ml_dtypes.bfloat16).reshape(CHUNK_K // 2, LANES, 2)
    return pairs.swapaxes(0, 1).reshape(LANES, CHUNK_K)


UNPACKERS: dict[tuple[str, str], Callable[[Bytes], Quants]] = {
    ("q4", "bf16"): q4_pairs,
    ("q4", "f32"): q4_pairs,
    ("q4", "int8"): q4_quads,
    ("q8", "bf16"): lambda chunk: chunk.view(np.int8).reshape(CHUNK_K, LANES).T,
    ("q8", "f32"): lambda chunk: chunk.view(np.int8).reshape(CHUNK_K, LANES).T,
    ("q8", "int8"): q8_quads,
    ("bf16", "bf16"): bf16_pairs,
    ("bf16", "f32"): bf16_pairs,
    ("f32", "f32"): lambda chunk: chunk.view(np.float32).reshape(CHUNK_K, LANES).T,
}
"""A chunk of bytes to quants [LANES, CHUNK_K], written down from the docstring of packing.py."""


def unpack(blocks: Bytes, packing: Packing, k: int) -> Weight:
    """The weight [len(blocks) * LANES, k] in packed blocks."""
    groups = -(-k // GROUP)
    row = FORMATS[packing.format]
    quants = np.empty((len(blocks), LANES, groups * GROUP), row.quant_dtype)
    planes = np.empty((packing.planes, len(blocks), LANES, groups), np.float16)
    for index, block in enumerate(blocks):
        heads = block[: 2 * packing.planes * groups * LANES].view(np.float16)
        planes[:, index] = heads.reshape(packing.planes, groups, LANES).swapaxes(1, 2)
        chunks = block[packing.header_bytes(groups) :].reshape(groups * CHUNKS, -1)
        for number, chunk in enumerate(chunks):
            start = number * CHUNK_K
            found = UNPACKERS[packing.format, packing.dot](chunk.copy())
            quants[index, :, start : start + CHUNK_K] = found
    flat = planes.reshape(packing.planes, len(blocks) * LANES, groups)
    return Weight(
        format=packing.format,
        quants=quants.reshape(len(blocks) * LANES, -1)[:, :k],
        scales=flat[0] if row.has_scale else None,
        minimums=flat[1] if row.has_minimum else None,
    )


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

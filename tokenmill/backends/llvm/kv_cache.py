"""The paged KV cache in memory: where a head of a block lies, and how tokens are stored in it.

    pool   [layer][block][head]; layers with a window may have fewer blocks than others
    keys   f32   [dimension][position]            one vector covers a block's positions
           bf16  [dimension / 2][position][2]
           int8  [pair]: [dimension][position], then a float32 scale for each position
    values f32, bf16   [position][dimension]      one vector covers LANES dimensions
           int8  [position][dimension], then [position][pair] float32 scales

Dimensions are stored dimensions (see `ir/order.py`), a pair is two vectors of them.
"""

from tokenmill.backends.base import BLOCK_SIZE
from tokenmill.backends.llvm.emit import Value
from tokenmill.backends.llvm.lanes import I32, Lanes
from tokenmill.backends.llvm.packing import PAIR_ROWS
from tokenmill.backends.llvm.scope import Scope
from tokenmill.ir.graph import Node, Type
from tokenmill.ir.numerics import SMALLEST_GROUP
from tokenmill.ir.order import LANES, padded_head

Pair = tuple[Value, Value]

ELEMENT_BYTES = {"f32": 4, "bf16": 2, "int8": 1}
SCALES_BYTES = 4 * BLOCK_SIZE
"""The scales of one pair of an int8 head."""


def is_windowed(kv: Type) -> bool:
    """Is it a cache of which only a window is read again?"""
    return len(kv.shape) == 3


def head_bytes(head_dim: int, to: str) -> int:
    """Bytes that one head of one block takes, keys or values."""
    size = padded_head(head_dim) * BLOCK_SIZE * ELEMENT_BYTES[to]
    return size + padded_head(head_dim) // PAIR_ROWS * SCALES_BYTES * (to == "int8")


def key_pair_bytes(to: str) -> int:
    """Bytes from one pair of a head's keys to the next."""
    return PAIR_ROWS * BLOCK_SIZE * ELEMENT_BYTES[to] + SCALES_BYTES * (to == "int8")


def head_address(scope: Scope, field: str, block: Value, head: Value, node: Node) -> Value:
    """Where a head of a block starts; `field` is keys or values, `node` the kv_write."""
    size = head_bytes(node.integer("head_dim"), node.string("to"))
    heads = int(node.result.type.shape[0])
    base = scope.load(field, "ptr").at(scope.element("cache_starts", scope.layer, "i64"))
    return base.at(block * (heads * size)).at(head * size)


def token_head(scope: Scope, field: str, row: Value, head: Value, node: Node) -> Value:
    """The same for the block that a token of this step is written to."""
    blocks = "window_token_blocks" if is_windowed(node.result.type) else "token_blocks"
    block = scope.f.widen(scope.element(blocks, row))
    return head_address(scope, field, block, head, node)


def quantize_pair(lanes: Lanes, values: Pair) -> tuple[list[Value], Value]:
    """Integers from -127 to 127 and the scale, max|x| / 127, of two vectors."""
    f = lanes.f
    largest = lanes.tree(lanes.maximum(*(lanes.absolute(v) for v in values)), "max")
    inverse = f.select(
        largest.compare("ogt", SMALLEST_GROUP), f.const("float", 127.0) / largest, 0.0
    )
    integers = [lanes.round_to_i32(v * lanes.splat(inverse)) for v in values]
    return integers, largest / f.const("float", 127.0)


def _position(scope: Scope, row: Value) -> Value:
    """A token's place in its block."""
    return scope.f.widen(scope.element("positions", row) & (BLOCK_SIZE - 1))


def store_keys(
    scope: Scope, values: Pair, head: Value, in_head: Value, row: Value, to: str
) -> None:
    """Store pair `in_head` of one token's keys."""
    f, lanes = scope.f, scope.lanes
    start = head.at(in_head * key_pair_bytes(to))
    position = _position(scope, row)
    if to == "int8":
        integers, scale = quantize_pair(lanes, values)
        f.store(scale, start.at(PAIR_ROWS * BLOCK_SIZE).at(position * 4))
        words = [f.cast("trunc", v, "i8") for v in integers]
    elif to == "bf16":
        words = [f.bitcast(lanes.f32_to_bf16(v), f"<{LANES // 2} x i32>") for v in values]
    else:
        words = [f.bitcast(v, I32) for v in values]
    size = 1 if to == "int8" else 4
    count = LANES // 2 if to == "bf16" else LANES
    place = start.at(position * size)
    for index, vector in enumerate(words):
        for lane in range(count):
            at = (index * count + lane) * BLOCK_SIZE * size
            f.store(f.extract(vector, lane), place.at(at))


def store_values(
    scope: Scope, values: Pair, head: Value, in_head: Value, row: Value, head_dim: int, to: str
) -> None:
    """Store pair `in_head` of one token's values."""
    f, lanes = scope.f, scope.lanes
    element, stored = ELEMENT_BYTES[to], padded_head(head_dim)
    position = _position(scope, row)
    place = head.at(position * (stored * element)).at(in_head * (PAIR_ROWS * element))
    narrow = list(values)
    if to == "int8":
        integers, scale = quantize_pair(lanes, values)
        f.store(scale, value_scale(head, position, in_head, head_dim))
        narrow = [f.cast("trunc", v, "i8") for v in integers]
    elif to == "bf16":
        narrow = [lanes.f32_to_bf16(v) for v in values]
    for index, vector in enumerate(narrow):
        f.store(vector, place.at(index * LANES * element))


def value_scale(head: Value, position: Value, pair: Value | int, head_dim: int) -> Value:
    """Where the scale of a pair of an int8 value lies."""
    stored = padded_head(head_dim)
    row = head.at(stored * BLOCK_SIZE).at(position * (stored // PAIR_ROWS * 4))
    return row.at(pair * 4)


def load_int8(lanes: Lanes, place: Value) -> Value:
    """LANES bytes as float32 integers."""
    f = lanes.f
    return f.cast("sitofp", f.cast("sext", f.load(f"<{LANES} x i8>", place), "i32"), "float")

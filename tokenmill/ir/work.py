"""How much work an operation is: FLOPs, and the bytes that it moves at the least."""

from collections.abc import Sequence

from tokenmill.ir.formats import FORMATS
from tokenmill.ir.graph import Node, Type
from tokenmill.ir.ops import OPS, Sizes, elements

_BYTES = {"lora": 4.0, "lora16": 2.0, "f32": 4.0, "i32": 4.0, "bf16": 2.0, "int8": 1.25}


def flops(node: Node, types: Sequence[Type], sizes: Sizes) -> int:
    """Additions and multiplications of a plain node."""
    return OPS[node.op].flops(types, node, sizes)


def size_bytes(kind: Type, sizes: Sizes) -> float:
    """Bytes that a value or a weight takes; handles take none."""
    if kind.dtype in FORMATS:
        return elements(kind, sizes) * FORMATS[kind.dtype].bits_per_weight / 8
    return elements(kind, sizes) * _BYTES.get(kind.dtype, 0.0)


def moved_bytes(node: Node, types: Sequence[Type], sizes: Sizes, *, cache: str) -> float:
    """Bytes that a plain node must read and write at least once.

    `cache` is the type in which keys and values are stored, which their handle does not say.
    """
    made = sum(size_bytes(v.type, sizes) for v in node.results)
    read = sum(size_bytes(t, sizes) for t in types)
    match node.op:
        case "embed" | "embed_place":
            rows = Type(types[1].dtype, node.result.type.shape)
            read = size_bytes(types[0], sizes) + size_bytes(rows, sizes)
        case "select_rows":
            read = made + size_bytes(types[1], sizes)
        case "shrink" | "expand":  # one adapter's factor at the least
            *others, factor = types[:-1]
            read = sum(size_bytes(t, sizes) for t in others)
            read += size_bytes(Type(factor.dtype, factor.shape[1:]), sizes)
        case "kv_write":
            made = 2 * elements(types[0], sizes) * _BYTES[node.string("to")]
        case "attention":
            heads = Type("kv", types[1].shape[:2])
            read += 2 * sizes["P"] * elements(heads, sizes) * _BYTES[cache]
    return made + read

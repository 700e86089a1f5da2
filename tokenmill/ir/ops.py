"""The one table of operations: operands, types, cost, and the NumPy reference of each.

To add an operation, add a row here, its type rule, and a lowering in each backend. `fused`,
`repeat` and `barrier` are structure, not arithmetic: the first two stand for the nodes inside
them, and `barrier` makes every thread of a step wait for the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from tokenmill.ir import numerics, sampling
from tokenmill.ir import type_rules as rules
from tokenmill.ir.graph import Attr, Node, Type
from tokenmill.ir.type_rules import TypeMismatchError, require

STRUCTURE = ("fused", "repeat", "barrier")

Sizes = Mapping[str, int]
"""What the symbols stand for: T, S, R, E; C, the positions attended to, summed over tokens; and P,
the positions in the caches that are read, summed over sequences."""

_WEIGHT_OPERANDS = ("table", "weight", "bias")


@dataclass(frozen=True, kw_only=True)
class Op:
    """One row of the table.

    `operands` and `attrs` name what it takes (a trailing ? marks an optional one); `infer` gives
    the result types or raises TypeMismatchError; `flops` counts additions and multiplications.
    `reference` takes the operands, for `kv_write` the cache too, and the attributes by name.
    """

    name: str
    operands: tuple[str, ...]
    attrs: Mapping[str, type]
    infer: Callable[[Sequence[Type], Node], Type]
    flops: Callable[[Sequence[Type], Node, Sizes], int]
    reference: Callable[..., object]


def elements(kind: Type, sizes: Sizes) -> int:
    """How many elements a value has, symbols filled in."""
    return prod(sizes[d] if isinstance(d, str) else d for d in kind.shape)


def _per_element(count: int) -> Callable[[Sequence[Type], Node, Sizes], int]:
    return lambda types, node, sizes: count * elements(types[0], sizes)


def _flops_linear(types: Sequence[Type], node: Node, sizes: Sizes) -> int:
    return 2 * elements(types[0], sizes) * node.result.type.width


def _flops_expand(types: Sequence[Type], node: Node, sizes: Sizes) -> int:
    return 2 * elements(types[1], sizes) * types[0].width + elements(types[0], sizes)


def _flops_attention(types: Sequence[Type], node: Node, sizes: Sizes) -> int:
    return 4 * sizes["C"] * int(types[0].shape[1])


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            name="embed",
            operands=("tokens", "table"),
            attrs={},
            infer=rules.infer_embed,
            flops=_per_element(0),
            reference=numerics.embed,
        ),
        Op(
            name="embed_place",
            operands=("place", "table"),
            attrs={"by": str, "offset?": int},
            infer=rules.infer_embed_place,
            flops=_per_element(0),
            reference=numerics.embed_place,
        ),
        Op(
            name="rmsnorm",
            operands=("x", "weight"),
            attrs={"eps": float},
            infer=rules.infer_rmsnorm,
            flops=_per_element(4),
            reference=numerics.rmsnorm,
        ),
        Op(
            name="layer_norm",
            operands=("x", "weight", "bias?"),
            attrs={"eps": float},
            infer=rules.infer_layer_norm,
            flops=_per_element(7),
            reference=numerics.layer_norm,
        ),
        Op(
            name="head_norm",
            operands=("x", "weight"),
            attrs={"head_dim": int, "eps": float},
            infer=rules.infer_head_norm,
            flops=_per_element(4),
            reference=numerics.head_norm,
        ),
        Op(
            name="round",
            operands=("x",),
            attrs={"to": str},
            infer=rules.infer_round,
            flops=_per_element(1),
            reference=numerics.round_to,
        ),
        Op(
            name="linear",
            operands=("x", "weight", "bias?"),
            attrs={},
            infer=rules.infer_linear,
            flops=_flops_linear,
            reference=numerics.linear,
        ),
        Op(
            name="rope",
            operands=("x", "place"),
            attrs={"head_dim": int, "theta?": float, "frequencies?": tuple, "magnitude?": float},
            infer=rules.infer_rope,
            flops=_per_element(3),
            reference=numerics.rope,
        ),
        Op(
            name="kv_write",
            operands=("k", "v", "place"),
            attrs={"head_dim": int, "to": str, "window?": int},
            infer=rules.infer_kv_write,
            flops=_per_element(0),
            reference=numerics.kv_write,
        ),
        Op(
            name="attention",
            operands=("q", "kv", "place"),
            attrs={
                **{"head_dim": int, "scale": float},
                **{"window?": int, "softcap?": float, "causal?": bool},
            },
            infer=rules.infer_attention,
            flops=_flops_attention,
            reference=numerics.attention,
        ),
        Op(
            name="silu",
            operands=("x",),
            attrs={},
            infer=rules.infer_unary,
            flops=_per_element(4),
            reference=numerics.silu,
        ),
        Op(
            name="gelu",
            operands=("x",),
            attrs={},
            infer=rules.infer_unary,
            flops=_per_element(8),
            reference=numerics.gelu,
        ),
        Op(
            name="gelu_erf",
            operands=("x",),
            attrs={},
            infer=rules.infer_unary,
            flops=_per_element(16),
            reference=numerics.gelu_erf,
        ),
        Op(
            name="scale",
            operands=("x",),
            attrs={"by": float},
            infer=rules.infer_unary,
            flops=_per_element(1),
            reference=numerics.scale,
        ),
        Op(
            name="softcap",
            operands=("x",),
            attrs={"cap": float},
            infer=rules.infer_unary,
            flops=_per_element(6),
            reference=numerics.bent,
        ),
        Op(
            name="add",
            operands=("a", "b"),
            attrs={},
            infer=rules.infer_binary,
            flops=_per_element(1),
            reference=numerics.add,
        ),
        Op(
            name="mul",
            operands=("a", "b"),
            attrs={},
            infer=rules.infer_binary,
            flops=_per_element(1),
            reference=numerics.mul,
        ),
        Op(
            name="route",
            operands=("logits",),
            attrs={"top_k": int, "renormalize": bool},
            infer=rules.infer_route,
            flops=_per_element(6),
            reference=numerics.route,
        ),
        Op(
            name="group",
            operands=("routes",),
            attrs={},
            infer=rules.infer_group,
            flops=_per_element(0),
            reference=numerics.group,
        ),
        Op(
            name="dispatch",
            operands=("x", "groups"),
            attrs={},
            infer=rules.infer_dispatch,
            flops=_per_element(0),
            reference=numerics.dispatch,
        ),
        Op(
            name="expert_linear",
            operands=("x", "weight", "groups"),
            attrs={},
            infer=rules.infer_expert_linear,
            flops=_flops_linear,
            reference=numerics.expert_linear,
        ),
        Op(
            name="combine",
            operands=("y", "routes", "groups"),
            attrs={},
            infer=rules.infer_combine,
            flops=_per_element(2),
            reference=numerics.combine,
        ),
        Op(
            name="shrink",
            operands=("x", "weight", "adapters"),
            attrs={},
            infer=rules.infer_shrink,
            flops=_flops_linear,
            reference=numerics.shrink,
        ),
        Op(
            name="expand",
            operands=("y", "low", "weight", "adapters"),
            attrs={},
            infer=rules.infer_expand,
            flops=_flops_expand,
            reference=numerics.expand,
        ),
        Op(
            name="select_rows",
            operands=("x", "rows"),
            attrs={},
            infer=rules.infer_select,
            flops=_per_element(0),
            reference=numerics.select_rows,
        ),
        Op(
            name="sample",
            operands=("logits", "sampling"),
            attrs={},
            infer=rules.infer_sample,
            flops=_per_element(1),
            reference=sampling.sample,
        ),
    )
}


def infer(node: Node, types: Sequence[Type]) -> Type:
    """The result type of a plain node. Raises TypeMismatchError, saying what is wrong."""
    row = OPS.get(node.op)
    if row is None:
        raise TypeMismatchError(f"there is no operation {node.op!r}")
    least = sum(not name.endswith("?") for name in row.operands)
    require(
        least <= len(types) <= len(row.operands),
        f"{node.op} takes {', '.join(row.operands)}; given {len(types)} operands",
    )
    for slot, name in zip(row.operands, node.operands, strict=False):
        is_weight = slot.removesuffix("?") in _WEIGHT_OPERANDS
        require(name.startswith("@" if is_weight else "%"), f"{name} cannot be the {slot}")
    given = dict(node.attrs)
    kinds = {key.removesuffix("?"): kind for key, kind in row.attrs.items()}
    fits = all(key in given or key + "?" in row.attrs for key in kinds) and all(
        key in kinds and _fits(value, kinds[key]) for key, value in given.items()
    )
    require(fits, f"{node.op} takes attributes {_attrs(row)}; given {given}")
    return row.infer(types, node)


def _fits(value: Attr, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


def _attrs(row: Op) -> str:
    return ", ".join(f"{key}: {kind.__name__}" for key, kind in row.attrs.items()) or "none"

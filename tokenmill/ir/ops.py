"""The one table of operations: operands, types, cost, and the NumPy reference of each.

To add an operation, add a row here and a lowering in each backend. `fused`, `repeat` and
`barrier` are structure, not arithmetic: the first two stand for the nodes inside them, and
`barrier` makes every thread of a step wait for the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from tokenmill.ir import numerics, sampling
from tokenmill.ir.formats import FORMATS
from tokenmill.ir.graph import Attr, Dim, Node, Type
from tokenmill.ir.low_rank import FACTORS

STRUCTURE = ("fused", "repeat", "barrier")
ACTIVATIONS = ("f32", "bf16", "int8")
WEIGHTS = ("w", *FORMATS)

Sizes = Mapping[str, int]
"""What the symbols stand for: T, S, R; C, the positions attended to, summed over tokens; and P,
the positions in the caches that are read, summed over sequences."""

_WEIGHT_OPERANDS = ("table", "weight", "bias")


class TypeMismatchError(ValueError):
    """An operation is given operands or attributes that it does not take."""


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


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise TypeMismatchError(message)


def _matrix(kind: Type, what: str) -> tuple[Dim, Dim]:
    _require(len(kind.shape) == 2, f"{what} must have two dimensions, has {kind}")
    return kind.shape[0], kind.shape[1]


def _count(kind: Type, dtype: str, what: str) -> Dim:
    _require(kind.dtype == dtype and len(kind.shape) == 1, f"{what} must be {dtype}[n], is {kind}")
    return kind.shape[0]


def _vector(kind: Type, what: str, size: Dim) -> None:
    _require(kind == Type("f32", (size,)), f"{what} must be f32[{size}], is {kind}")


def _placed(x: Type, place: Type) -> None:
    rows, _ = _matrix(x, "x")
    _require(place == Type("place", (rows,)), f"the place must be place[{rows}], is {place}")


def _infer_embed(types: Sequence[Type], node: Node) -> Type:
    tokens, table = types
    rows, (_, k) = _count(tokens, "i32", "the tokens"), _matrix(table, "the table")
    _require(table.dtype in WEIGHTS, f"the table must be a weight, is {table}")
    return Type("f32", (rows, k))


def _infer_embed_place(types: Sequence[Type], node: Node) -> Type:
    place, table = types
    rows, (_, k) = _count(place, "place", "the place"), _matrix(table, "the table")
    _require(table.dtype in WEIGHTS, f"the table must be a weight, is {table}")
    _require(node.string("by") in ("position", "segment"), f"nothing lies by {node.attr('by')}")
    offset = node.integer("offset") if "offset" in dict(node.attrs) else 0
    _require(offset >= 0, "an offset must not be negative")
    return Type("f32", (rows, k))


def _infer_rmsnorm(types: Sequence[Type], node: Node) -> Type:
    x, weight = types
    _require(x.dtype == "f32", f"x must be f32, is {x}")
    _vector(weight, "the weight", _matrix(x, "x")[1])
    return x


def _infer_layer_norm(types: Sequence[Type], node: Node) -> Type:
    _vector(types[2], "the bias", _matrix(types[0], "x")[1])
    return _infer_rmsnorm(types[:2], node)


def _infer_head_norm(types: Sequence[Type], node: Node) -> Type:
    x, weight = types
    _require(x.dtype == "f32", f"x must be f32, is {x}")
    _heads(x, node)
    _vector(weight, "the weight", node.integer("head_dim"))
    return x


def _infer_round(types: Sequence[Type], node: Node) -> Type:
    _require(types[0].dtype == "f32", f"x must be f32, is {types[0]}")
    _require(node.string("to") in ACTIVATIONS, f"cannot round to {node.attr('to')}")
    return Type(node.string("to"), types[0].shape)


def _infer_linear(types: Sequence[Type], node: Node) -> Type:
    x, weight = types[:2]
    rows, k = _matrix(x, "x")
    n, weight_k = _matrix(weight, "the weight")
    _require(x.dtype in ACTIVATIONS, f"x must be an activation, is {x}")
    _require(weight.dtype in WEIGHTS, f"the weight must be a weight, is {weight}")
    _require(weight_k == k, f"the weight takes {weight_k} inputs, x is {x}")
    if len(types) == 3:
        _vector(types[2], "the bias", n)
    return Type("f32", (rows, n))


def _infer_rope(types: Sequence[Type], node: Node) -> Type:
    x, place = types
    _require(x.dtype == "f32", f"x must be f32, is {x}")
    _placed(x, place)
    _heads(x, node)
    _require(node.integer("head_dim") % 2 == 0, "rope turns pairs: head_dim must be even")
    given = dict(node.attrs)
    _require(("theta" in given) != ("frequencies" in given), "rope takes theta or frequencies")
    frequencies = given.get("frequencies")
    if isinstance(frequencies, tuple):
        are_numbers = all(isinstance(number, int | float) for number in frequencies)
        pairs = node.integer("head_dim") // 2
        _require(are_numbers and len(frequencies) == pairs, f"rope takes {pairs} frequencies")
    return x


def _heads(x: Type, node: Node) -> int:
    n, head_dim = _matrix(x, "x")[1], node.integer("head_dim")
    _require(
        isinstance(n, int) and head_dim > 0 and n % head_dim == 0,
        f"{x} is no multiple of head_dim {head_dim}",
    )
    return int(n) // head_dim


def _infer_kv_write(types: Sequence[Type], node: Node) -> Type:
    k, v, place = types
    _require(k == v and k.dtype == "f32", f"k and v must be alike and f32, are {k} and {v}")
    _placed(k, place)
    _require(node.string("to") in ACTIVATIONS, f"no cache of {node.attr('to')}")
    kept = (node.integer("window"),) if "window" in dict(node.attrs) else ()
    _require(0 not in kept, "a window must hold a position")
    return Type("kv", (_heads(k, node), node.integer("head_dim"), *kept))


def _infer_attention(types: Sequence[Type], node: Node) -> Type:
    q, kv, place = types
    _require(q.dtype in ("f32", "bf16"), f"q must be f32 or bf16, is {q}")
    _require(kv.dtype == "kv", f"kv must be a cache, is {kv}")
    _placed(q, place)
    heads, (kv_heads, head_dim, *kept) = _heads(q, node), map(int, kv.shape)
    _require(node.integer("head_dim") == head_dim, f"head_dim differs from that of {kv}")
    _require(heads % kv_heads == 0, f"{heads} heads do not share {kv_heads} key heads evenly")
    given = dict(node.attrs)
    window = node.integer("window") if "window" in given else 0
    _require("window" not in given or window > 0, "a window must hold a position")
    _require(not window or bool(given.get("causal", True)), "a window looks back only")
    _require(not kept or 0 < window <= kept[0], f"a window of {window or 'all'} over {kv}")
    return Type("f32", q.shape)


def _infer_route(types: Sequence[Type], node: Node) -> Type:
    rows, experts = _matrix(types[0], "logits")
    _require(types[0].dtype == "f32", f"logits must be f32, are {types[0]}")
    top_k = node.integer("top_k")
    _require(0 < top_k <= int(experts), f"cannot choose {top_k} of {experts} experts")
    return Type("routes", (rows, top_k, experts))


def _infer_group(types: Sequence[Type], node: Node) -> Type:
    [routes] = types
    _require(routes.dtype == "routes", f"the routes must be routes[T,K,E], are {routes}")
    return Type("groups", routes.shape)


def _grouped(x: Type, groups: Type) -> None:
    """x has a row for each pair of token and expert."""
    fits = groups.dtype == "groups" and x.shape[:-1] == groups.shape[:2]
    _require(fits, f"x must have a row a pair of {groups}, is {x}")


def _infer_dispatch(types: Sequence[Type], node: Node) -> Type:
    x, groups = types
    rows, k = _matrix(x, "x")
    _require(x.dtype == "f32", f"x must be f32, is {x}")
    _require(groups.dtype == "groups", f"the groups must be groups[T,K,E], are {groups}")
    _require(groups.shape[0] == rows, f"{groups} do not group {x}")
    return Type("f32", (*groups.shape[:2], k))


def _infer_expert_linear(types: Sequence[Type], node: Node) -> Type:
    x, weight, groups = types
    _grouped(x, groups)
    experts = groups.width
    n, k = map(int, _matrix(weight, "the weight"))
    _require(x.dtype in ACTIVATIONS, f"x must be an activation, is {x}")
    _require(weight.dtype in WEIGHTS, f"the weight must be a weight, is {weight}")
    _require(k == x.width, f"the weight takes {k} inputs, x is {x}")
    _require(n % experts == 0, f"{weight} does not divide by {experts} experts")
    return Type("f32", (*x.rows, n // experts))


def _infer_combine(types: Sequence[Type], node: Node) -> Type:
    y, routes, groups = types
    _grouped(y, groups)
    _require(y.dtype == "f32", f"y must be f32, is {y}")
    _require(routes == Type("routes", groups.shape), f"{routes} are not those of {groups}")
    return Type("f32", (y.shape[0], y.width))


def _factor(x: Type, weight: Type, adapters: Type) -> tuple[int, int]:
    """The last two sizes of a factor, which each row of x takes from its adapter."""
    rows, _ = _matrix(x, "x")
    fits = weight.dtype in FACTORS and len(weight.shape) == 3
    _require(fits, f"the weight must be lora[S,N,K], is {weight}")
    _require(adapters == Type("adapters", (rows,)), f"{adapters} are not those of {x}")
    return int(weight.shape[1]), int(weight.shape[2])


def _infer_shrink(types: Sequence[Type], node: Node) -> Type:
    x, weight, adapters = types
    rank, k = _factor(x, weight, adapters)
    _require(x.dtype in ACTIVATIONS, f"x must be an activation, is {x}")
    _require(k == x.width, f"the weight takes {k} inputs, x is {x}")
    return Type("f32", (*x.rows, rank))


def _infer_expand(types: Sequence[Type], node: Node) -> Type:
    y, low, weight, adapters = types
    n, rank = _factor(low, weight, adapters)
    _require(low == Type("f32", (*y.rows, rank)), f"{low} does not fit {weight} and {y}")
    _require(y == Type("f32", (*low.rows, n)), f"y must be f32[{low.rows[0]},{n}], is {y}")
    return y


def _infer_unary(types: Sequence[Type], node: Node) -> Type:
    _require(types[0].dtype == "f32", f"x must be f32, is {types[0]}")
    return types[0]


def _infer_binary(types: Sequence[Type], node: Node) -> Type:
    _require(types[0] == types[1], f"operands differ: {types[0]} and {types[1]}")
    return _infer_unary(types, node)


def _infer_select(types: Sequence[Type], node: Node) -> Type:
    x, rows = types
    _require(x.dtype == "f32", f"x must be f32, is {x}")
    return Type("f32", (_count(rows, "i32", "the rows"), _matrix(x, "x")[1]))


def _infer_sample(types: Sequence[Type], node: Node) -> Type:
    logits, sampling = types
    rows, _ = _matrix(logits, "logits")
    _require(logits.dtype == "f32", f"logits must be f32, are {logits}")
    _require(sampling == Type("sampling", (rows,)), f"sampling is {sampling} for {rows} rows")
    return Type("i32", (rows,))


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
            infer=_infer_embed,
            flops=_per_element(0),
            reference=numerics.embed,
        ),
        Op(
            name="embed_place",
            operands=("place", "table"),
            attrs={"by": str, "offset?": int},
            infer=_infer_embed_place,
            flops=_per_element(0),
            reference=numerics.embed_place,
        ),
        Op(
            name="rmsnorm",
            operands=("x", "weight"),
            attrs={"eps": float},
            infer=_infer_rmsnorm,
            flops=_per_element(4),
            reference=numerics.rmsnorm,
        ),
        Op(
            name="layer_norm",
            operands=("x", "weight", "bias"),
            attrs={"eps": float},
            infer=_infer_layer_norm,
            flops=_per_element(7),
            reference=numerics.layer_norm,
        ),
        Op(
            name="head_norm",
            operands=("x", "weight"),
            attrs={"head_dim": int, "eps": float},
            infer=_infer_head_norm,
            flops=_per_element(4),
            reference=numerics.head_norm,
        ),
        Op(
            name="round",
            operands=("x",),
            attrs={"to": str},
            infer=_infer_round,
            flops=_per_element(1),
            reference=numerics.round_to,
        ),
        Op(
            name="linear",
            operands=("x", "weight", "bias?"),
            attrs={},
            infer=_infer_linear,
            flops=_flops_linear,
            reference=numerics.linear,
        ),
        Op(
            name="rope",
            operands=("x", "place"),
            attrs={"head_dim": int, "theta?": float, "frequencies?": tuple, "magnitude?": float},
            infer=_infer_rope,
            flops=_per_element(3),
            reference=numerics.rope,
        ),
        Op(
            name="kv_write",
            operands=("k", "v", "place"),
            attrs={"head_dim": int, "to": str, "window?": int},
            infer=_infer_kv_write,
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
            infer=_infer_attention,
            flops=_flops_attention,
            reference=numerics.attention,
        ),
        Op(
            name="silu",
            operands=("x",),
            attrs={},
            infer=_infer_unary,
            flops=_per_element(4),
            reference=numerics.silu,
        ),
        Op(
            name="gelu",
            operands=("x",),
            attrs={},
            infer=_infer_unary,
            flops=_per_element(8),
            reference=numerics.gelu,
        ),
        Op(
            name="gelu_erf",
            operands=("x",),
            attrs={},
            infer=_infer_unary,
            flops=_per_element(16),
            reference=numerics.gelu_erf,
        ),
        Op(
            name="scale",
            operands=("x",),
            attrs={"by": float},
            infer=_infer_unary,
            flops=_per_element(1),
            reference=numerics.scale,
        ),
        Op(
            name="softcap",
            operands=("x",),
            attrs={"cap": float},
            infer=_infer_unary,
            flops=_per_element(6),
            reference=numerics.bent,
        ),
        Op(
            name="add",
            operands=("a", "b"),
            attrs={},
            infer=_infer_binary,
            flops=_per_element(1),
            reference=numerics.add,
        ),
        Op(
            name="mul",
            operands=("a", "b"),
            attrs={},
            infer=_infer_binary,
            flops=_per_element(1),
            reference=numerics.mul,
        ),
        Op(
            name="route",
            operands=("logits",),
            attrs={"top_k": int, "renormalize": bool},
            infer=_infer_route,
            flops=_per_element(6),
            reference=numerics.route,
        ),
        Op(
            name="group",
            operands=("routes",),
            attrs={},
            infer=_infer_group,
            flops=_per_element(0),
            reference=numerics.group,
        ),
        Op(
            name="dispatch",
            operands=("x", "groups"),
            attrs={},
            infer=_infer_dispatch,
            flops=_per_element(0),
            reference=numerics.dispatch,
        ),
        Op(
            name="expert_linear",
            operands=("x", "weight", "groups"),
            attrs={},
            infer=_infer_expert_linear,
            flops=_flops_linear,
            reference=numerics.expert_linear,
        ),
        Op(
            name="combine",
            operands=("y", "routes", "groups"),
            attrs={},
            infer=_infer_combine,
            flops=_per_element(2),
            reference=numerics.combine,
        ),
        Op(
            name="shrink",
            operands=("x", "weight", "adapters"),
            attrs={},
            infer=_infer_shrink,
            flops=_flops_linear,
            reference=numerics.shrink,
        ),
        Op(
            name="expand",
            operands=("y", "low", "weight", "adapters"),
            attrs={},
            infer=_infer_expand,
            flops=_flops_expand,
            reference=numerics.expand,
        ),
        Op(
            name="select_rows",
            operands=("x", "rows"),
            attrs={},
            infer=_infer_select,
            flops=_per_element(0),
            reference=numerics.select_rows,
        ),
        Op(
            name="sample",
            operands=("logits", "sampling"),
            attrs={},
            infer=_infer_sample,
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
    _require(
        least <= len(types) <= len(row.operands),
        f"{node.op} takes {', '.join(row.operands)}; given {len(types)} operands",
    )
    for slot, name in zip(row.operands, node.operands, strict=False):
        is_weight = slot.removesuffix("?") in _WEIGHT_OPERANDS
        _require(name.startswith("@" if is_weight else "%"), f"{name} cannot be the {slot}")
    given = dict(node.attrs)
    kinds = {key.removesuffix("?"): kind for key, kind in row.attrs.items()}
    fits = all(key in given or key + "?" in row.attrs for key in kinds) and all(
        key in kinds and _fits(value, kinds[key]) for key, value in given.items()
    )
    _require(fits, f"{node.op} takes attributes {_attrs(row)}; given {given}")
    return row.infer(types, node)


def _fits(value: Attr, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


def _attrs(row: Op) -> str:
    return ", ".join(f"{key}: {kind.__name__}" for key, kind in row.attrs.items()) or "none"

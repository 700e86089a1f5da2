"""What each operation's result is, from its operands' types: the `infer` column of ops.py's table.

Each takes the operands' types and the node, and raises TypeMismatchError where they do not fit.
"""

from collections.abc import Sequence

from tokenmill.ir.formats import FORMATS
from tokenmill.ir.graph import Dim, Node, Type
from tokenmill.ir.low_rank import FACTORS

ACTIVATIONS = ("f32", "bf16", "int8")
WEIGHTS = ("w", *FORMATS)


class TypeMismatchError(ValueError):
    """An operation is given operands or attributes that it does not take."""


def require(holds: bool, message: str) -> None:
    if not holds:
        raise TypeMismatchError(message)


def _matrix(kind: Type, what: str) -> tuple[Dim, Dim]:
    require(len(kind.shape) == 2, f"{what} must have two dimensions, has {kind}")
    return kind.shape[0], kind.shape[1]


def _count(kind: Type, dtype: str, what: str) -> Dim:
    require(kind.dtype == dtype and len(kind.shape) == 1, f"{what} must be {dtype}[n], is {kind}")
    return kind.shape[0]


def _vector(kind: Type, what: str, size: Dim) -> None:
    require(kind == Type("f32", (size,)), f"{what} must be f32[{size}], is {kind}")


def _placed(x: Type, place: Type) -> None:
    rows, _ = _matrix(x, "x")
    require(place == Type("place", (rows,)), f"the place must be place[{rows}], is {place}")


def infer_embed(types: Sequence[Type], node: Node) -> Type:
    tokens, table = types
    rows, (_, k) = _count(tokens, "i32", "the tokens"), _matrix(table, "the table")
    require(table.dtype in WEIGHTS, f"the table must be a weight, is {table}")
    return Type("f32", (rows, k))


def infer_embed_place(types: Sequence[Type], node: Node) -> Type:
    place, table = types
    rows, (_, k) = _count(place, "place", "the place"), _matrix(table, "the table")
    require(table.dtype in WEIGHTS, f"the table must be a weight, is {table}")
    require(node.string("by") in ("position", "segment"), f"nothing lies by {node.attr('by')}")
    offset = node.integer("offset") if "offset" in dict(node.attrs) else 0
    require(offset >= 0, "an offset must not be negative")
    return Type("f32", (rows, k))


def infer_rmsnorm(types: Sequence[Type], node: Node) -> Type:
    x, weight = types
    require(x.dtype == "f32", f"x must be f32, is {x}")
    _vector(weight, "the weight", _matrix(x, "x")[1])
    return x


def infer_layer_norm(types: Sequence[Type], node: Node) -> Type:
    for bias in types[2:]:
        _vector(bias, "the bias", _matrix(types[0], "x")[1])
    return infer_rmsnorm(types[:2], node)


def infer_head_norm(types: Sequence[Type], node: Node) -> Type:
    x, weight = types
    require(x.dtype == "f32", f"x must be f32, is {x}")
    _heads(x, node)
    _vector(weight, "the weight", node.integer("head_dim"))
    return x


def infer_round(types: Sequence[Type], node: Node) -> Type:
    require(types[0].dtype == "f32", f"x must be f32, is {types[0]}")
    require(node.string("to") in ACTIVATIONS, f"cannot round to {node.attr('to')}")
    return Type(node.string("to"), types[0].shape)


def infer_linear(types: Sequence[Type], node: Node) -> Type:
    x, weight = types[:2]
    rows, k = _matrix(x, "x")
    n, weight_k = _matrix(weight, "the weight")
    require(x.dtype in ACTIVATIONS, f"x must be an activation, is {x}")
    require(weight.dtype in WEIGHTS, f"the weight must be a weight, is {weight}")
    require(weight_k == k, f"the weight takes {weight_k} inputs, x is {x}")
    if len(types) == 3:
        _vector(types[2], "the bias", n)
    return Type("f32", (rows, n))


def infer_rope(types: Sequence[Type], node: Node) -> Type:
    x, place = types
    require(x.dtype == "f32", f"x must be f32, is {x}")
    _placed(x, place)
    _heads(x, node)
    require(node.integer("head_dim") % 2 == 0, "rope turns pairs: head_dim must be even")
    given = dict(node.attrs)
    require(("theta" in given) != ("frequencies" in given), "rope takes theta or frequencies")
    frequencies = given.get("frequencies")
    if isinstance(frequencies, tuple):
        are_numbers = all(isinstance(number, int | float) for number in frequencies)
        pairs = node.integer("head_dim") // 2
        require(are_numbers and len(frequencies) == pairs, f"rope takes {pairs} frequencies")
    return x


def _heads(x: Type, node: Node) -> int:
    n, head_dim = _matrix(x, "x")[1], node.integer("head_dim")
    require(
        isinstance(n, int) and head_dim > 0 and n % head_dim == 0,
        f"{x} is no multiple of head_dim {head_dim}",
    )
    return int(n) // head_dim


def infer_kv_write(types: Sequence[Type], node: Node) -> Type:
    k, v, place = types
    require(k == v and k.dtype == "f32", f"k and v must be alike and f32, are {k} and {v}")
    _placed(k, place)
    require(node.string("to") in ACTIVATIONS, f"no cache of {node.attr('to')}")
    kept = (node.integer("window"),) if "window" in dict(node.attrs) else ()
    require(0 not in kept, "a window must hold a position")
    return Type("kv", (_heads(k, node), node.integer("head_dim"), *kept))


def infer_attention(types: Sequence[Type], node: Node) -> Type:
    q, kv, place = types
    require(q.dtype in ("f32", "bf16"), f"q must be f32 or bf16, is {q}")
    require(kv.dtype == "kv", f"kv must be a cache, is {kv}")
    _placed(q, place)
    heads, (kv_heads, head_dim, *kept) = _heads(q, node), map(int, kv.shape)
    require(node.integer("head_dim") == head_dim, f"head_dim differs from that of {kv}")
    require(heads % kv_heads == 0, f"{heads} heads do not share {kv_heads} key heads evenly")
    given = dict(node.attrs)
    window = node.integer("window") if "window" in given else 0
    require("window" not in given or window > 0, "a window must hold a position")
    is_causal = bool(given.get("causal", True))
    require(is_causal or not kept, f"{kv} has no positions behind a window")
    require(not kept or 0 < window <= kept[0], f"a window of {window or 'all'} over {kv}")
    return Type("f32", q.shape)


def infer_route(types: Sequence[Type], node: Node) -> Type:
    rows, experts = _matrix(types[0], "logits")
    require(types[0].dtype == "f32", f"logits must be f32, are {types[0]}")
    top_k = node.integer("top_k")
    require(0 < top_k <= int(experts), f"cannot choose {top_k} of {experts} experts")
    return Type("routes", (rows, top_k, experts))


def infer_group(types: Sequence[Type], node: Node) -> Type:
    [routes] = types
    require(routes.dtype == "routes", f"the routes must be routes[T,K,E], are {routes}")
    return Type("groups", routes.shape)


def _grouped(x: Type, groups: Type) -> None:
    """x has a row for each pair of token and expert."""
    fits = groups.dtype == "groups" and x.shape[:-1] == groups.shape[:2]
    require(fits, f"x must have a row a pair of {groups}, is {x}")


def infer_dispatch(types: Sequence[Type], node: Node) -> Type:
    x, groups = types
    rows, k = _matrix(x, "x")
    require(x.dtype == "f32", f"x must be f32, is {x}")
    require(groups.dtype == "groups", f"the groups must be groups[T,K,E], are {groups}")
    require(groups.shape[0] == rows, f"{groups} do not group {x}")
    return Type("f32", (*groups.shape[:2], k))


def infer_expert_linear(types: Sequence[Type], node: Node) -> Type:
    x, weight, groups = types
    _grouped(x, groups)
    experts = groups.width
    n, k = map(int, _matrix(weight, "the weight"))
    require(x.dtype in ACTIVATIONS, f"x must be an activation, is {x}")
    require(weight.dtype in WEIGHTS, f"the weight must be a weight, is {weight}")
    require(k == x.width, f"the weight takes {k} inputs, x is {x}")
    require(n % experts == 0, f"{weight} does not divide by {experts} experts")
    return Type("f32", (*x.rows, n // experts))


def infer_combine(types: Sequence[Type], node: Node) -> Type:
    y, routes, groups = types
    _grouped(y, groups)
    require(y.dtype == "f32", f"y must be f32, is {y}")
    require(routes == Type("routes", groups.shape), f"{routes} are not those of {groups}")
    return Type("f32", (y.shape[0], y.width))


def _factor(x: Type, weight: Type, adapters: Type) -> tuple[int, int]:
    """The last two sizes of a factor, which each row of x takes from its adapter."""
    rows, _ = _matrix(x, "x")
    fits = weight.dtype in FACTORS and len(weight.shape) == 3
    require(fits, f"the weight must be lora[S,N,K], is {weight}")
    require(adapters == Type("adapters", (rows,)), f"{adapters} are not those of {x}")
    return int(weight.shape[1]), int(weight.shape[2])


def infer_shrink(types: Sequence[Type], node: Node) -> Type:
    x, weight, adapters = types
    rank, k = _factor(x, weight, adapters)
    require(x.dtype in ACTIVATIONS, f"x must be an activation, is {x}")
    require(k == x.width, f"the weight takes {k} inputs, x is {x}")
    return Type("f32", (*x.rows, rank))


def infer_expand(types: Sequence[Type], node: Node) -> Type:
    y, low, weight, adapters = types
    n, rank = _factor(low, weight, adapters)
    fits = low.dtype in ("f32", FACTORS[weight.dtype]) and low.shape == (*y.rows, rank)
    require(fits, f"{low} does not fit {weight} and {y}")
    require(y == Type("f32", (*low.rows, n)), f"y must be f32[{low.rows[0]},{n}], is {y}")
    return y


def infer_unary(types: Sequence[Type], node: Node) -> Type:
    require(types[0].dtype == "f32", f"x must be f32, is {types[0]}")
    return types[0]


def infer_binary(types: Sequence[Type], node: Node) -> Type:
    require(types[0] == types[1], f"operands differ: {types[0]} and {types[1]}")
    return infer_unary(types, node)


def infer_select(types: Sequence[Type], node: Node) -> Type:
    x, rows = types
    require(x.dtype == "f32", f"x must be f32, is {x}")
    return Type("f32", (_count(rows, "i32", "the rows"), _matrix(x, "x")[1]))


def infer_sample(types: Sequence[Type], node: Node) -> Type:
    logits, sampling = types
    rows, _ = _matrix(logits, "logits")
    require(logits.dtype == "f32", f"logits must be f32, are {logits}")
    require(sampling == Type("sampling", (rows,)), f"sampling is {sampling} for {rows} rows")
    return Type("i32", (rows,))

"""Phases that walk rows one at a time: embed, norm, selection, and elementwise leftovers."""

import numpy as np
import numpy.typing as npt

from tokenmill.backends.llvm.emit import Value
from tokenmill.backends.llvm.epilogue import Epilogue, load_pair, load_value
from tokenmill.backends.llvm.headers import Reader
from tokenmill.backends.llvm.kv_cache import store_keys, store_values, token_head
from tokenmill.backends.llvm.lanes import F32, f8_to_f32
from tokenmill.backends.llvm.packing import PACKINGS, PAIR_ROWS, Packing, RowOrder
from tokenmill.backends.llvm.scope import Scope, Slot, pairs_of
from tokenmill.ir.formats import FORMATS
from tokenmill.ir.graph import Node
from tokenmill.ir.order import GROUP, LANES, padded_head, stored_dims


def lower_embed(scope: Scope, node: Node, dot: str) -> None:
    """Unpack one row of the table a token: that of its id, of its position or of its segment.

    The table may serve as LM head too, so it is packed for the same `dot`.
    """
    table = scope.types[node.operands[1]]
    groups = -(-int(table.shape[1]) // GROUP)
    packing = PACKINGS[table.dtype, dot]
    order = RowOrder(count=int(table.shape[0]))
    panel = scope.weight(Slot(name=node.operands[1], packing=packing, order=order))
    with scope.share(scope.count(node.result.name)) as t:
        entry = _table_row(scope, node, t)
        block = panel.at((entry >> 4) * packing.block_bytes(groups))
        out = scope.row_address(node.result.name, t)
        reader = packing.header.reader(scope.lanes, [block], groups)
        with reader.walk() as group:
            _unpack_group(scope, packing, reader, entry & (LANES - 1), group, out)


def _table_row(scope: Scope, node: Node, t: Value) -> Value:
    """Which row of its table an embedding of token `t` takes."""
    if node.op == "embed":
        return _token(scope, t)
    kept = "positions" if node.string("by") == "position" else "segments"
    offset = node.integer("offset") if "offset" in dict(node.attrs) else 0
    return scope.f.widen(scope.element(kept, t)) + offset


def _token(scope: Scope, t: Value) -> Value:
    """A token's id; below 0 it names a slot (see StepInput)."""
    f = scope.f
    token = f.variable("i64", f.widen(scope.element("tokens", t)))
    with f.when(token.get().compare("slt", 0)):
        slot = f.const("i64", -1) - token.get()
        token.set(f.widen(scope.element("slots", slot)))
    return token.get()


def _unpack_group(
    scope: Scope, packing: Packing, reader: Reader, lane: Value, group: Value, out: Value
) -> None:
    """One group of one row of a packed block, as float32."""
    f = scope.f
    header = packing.header_bytes(reader.groups)
    start = reader.blocks[0].at(header).at(group * packing.group_bytes)
    parts = GROUP // FORMATS[packing.format].group
    inputs, size = GROUP // parts, packing.group_bytes // parts
    for part in range(parts):
        scale, minimum = (
            None if plane is None else _pick(scope, plane, lane)
            for plane in reader.scales(group, part, 0)
        )
        to = out.at(group * (4 * GROUP)).at(part * 4 * inputs)
        with f.loop(0, inputs // packing.chunk_k) as chunk:
            place = start.at(part * size).at(chunk * packing.chunk_bytes)
            for k in range(packing.chunk_k):
                value = _element(scope, packing, place, lane, k)
                value = value if scale is None else value * scale
                value = value if minimum is None else value + minimum
                f.store(value, to.at(chunk * (4 * packing.chunk_k)).at(4 * k))


def _pick(scope: Scope, plane: Value, lane: Value) -> Value:
    f = scope.f
    slot = f.variable(F32, plane)
    return f.load("float", Value(f, slot.text, "ptr").at(lane * 4))


def _element(scope: Scope, packing: Packing, chunk: Value, lane: Value, k: int) -> Value:
    """Quant k of a chunk in one lane, as float; the layouts of packing.py, read singly."""
    f = scope.f
    match packing.format, packing.dot:
        case "q8" | "q8_z", "int8":
            byte = f.load("i8", chunk.at((k // 4) * 64).at(lane * 4).at(k % 4))
            return f.cast("sitofp", f.cast("sext", byte ^ -128, "i32"), "float")
        case "q8" | "q8_z", _:
            byte = f.load("i8", chunk.at(k * LANES).at(lane))
            return f.cast("sitofp", f.cast("sext", byte, "i32"), "float")
        case "f8", _:
            return f8_to_f32(f, f.load("i8", chunk.at(k * LANES).at(lane)))
        case "bf16", _:
            short = f.load("i16", chunk.at((k // 2) * 64).at(lane * 4).at(2 * (k % 2)))
            return f.bitcast(f.cast("zext", short, "i32") << 16, "float")
        case "f32", _:
            return f.load("float", chunk.at(k * 64).at(lane * 4))
    return f.cast("sitofp", _nibble(scope, packing, chunk, lane, k), "float")


def _nibble(scope: Scope, packing: Packing, chunk: Value, lane: Value, k: int) -> Value:
    """A quant of a nibble and maybe upper bits, as i32."""
    word, row = scope.f.load("i32", chunk.at(k // 8 * 64).at(lane * 4)), FORMATS[packing.format]
    is_quad = packing.dot == "int8"
    shift = 8 * (k % 4) + 4 * (k % 8 // 4) if is_quad else 4 * (k % 8 // 2) + 16 * (k % 2)
    quant = (word >> shift) & 15
    if bits := packing.bits - 4:
        upper = scope.f.load("i32", chunk.at(packing.chunk_bytes - 64).at(lane * 4))
        shift = 8 * (k % 4) + bits * (k // 4) if is_quad else bits * (k // 2) + 16 * (k % 2)
        quant = quant | (((upper >> shift) & (2**bits - 1)) << 4)
    return quant + row.lowest if row.lowest else quant


def lower_norm(scope: Scope, node: Node) -> None:
    """rmsnorm and what is fused with it: one walk for the sum, one for the rest."""
    f, lanes = scope.f, scope.lanes
    norm, *rest = node.leaves
    epilogue = Epilogue(nodes=rest, visible=frozenset(v.name for v in node.results))
    source = norm.operands[0]
    size = int(scope.types[source].shape[1])
    weight = scope.vector(norm.operands[1])
    with scope.share(scope.count(source)) as t:
        total = f.variable(F32, 0.0)
        pairs = pairs_of(scope.buffers[source])
        with f.loop(0, pairs) as pair:
            for vector in load_value(scope, source, t, pair):
                total.set(lanes.fma(vector, vector, total.get()))
        mean = lanes.tree(total.get()) / float(size)
        root = f.overloaded("sqrt", mean + norm.real("eps"))
        scale = lanes.splat(f.const("float", 1.0) / root)
        with f.loop(0, pairs) as pair:
            x, w = load_value(scope, source, t, pair), load_pair(scope, weight, pair)
            made = (x[0] * scale * w[0], x[1] * scale * w[1])
            epilogue.run(scope, {norm.result.name: made}, t, pair)


def lower_layer_norm(scope: Scope, node: Node) -> None:
    """layer_norm and what is fused with it: a walk for the mean, one for the spread, the rest."""
    f, lanes = scope.f, scope.lanes
    norm, *rest = node.leaves
    epilogue = Epilogue(nodes=rest, visible=frozenset(v.name for v in node.results))
    source = norm.operands[0]
    size = float(int(scope.types[source].shape[1]))
    weight, *biases = (scope.vector(name) for name in norm.operands[1:])
    with scope.share(scope.count(source)) as t:
        total, square = f.variable(F32, 0.0), f.variable(F32, 0.0)
        pairs = pairs_of(scope.buffers[source])
        with f.loop(0, pairs) as pair:
            for vector in load_value(scope, source, t, pair):
                total.set(total.get() + vector)
        mean = lanes.splat(lanes.tree(total.get()) / size)
        with f.loop(0, pairs) as pair:
            for vector in load_value(scope, source, t, pair, mean):
                square.set(lanes.fma(vector - mean, vector - mean, square.get()))
        root = f.overloaded("sqrt", lanes.tree(square.get()) / size + norm.real("eps"))
        scale = lanes.splat(f.const("float", 1.0) / root)
        with f.loop(0, pairs) as pair:
            x = load_value(scope, source, t, pair, mean)
            w = load_pair(scope, weight, pair)
            low, high = ((x[i] - mean) * scale * w[i] for i in (0, 1))
            for bias in biases:
                b = load_pair(scope, bias, pair)
                low, high = low + b[0], high + b[1]
            epilogue.run(scope, {norm.result.name: (low, high)}, t, pair)


def lower_head_norm(scope: Scope, node: Node) -> None:
    """The norm of each head by itself; heads lie side by side, whatever their size."""
    f, lanes = scope.f, scope.lanes
    head_dim = node.integer("head_dim")
    heads = int(node.result.type.shape[1]) // head_dim
    weight = scope.vector(node.operands[1])
    ends = [(at, min(LANES, head_dim - at)) for at in range(0, head_dim, LANES)]
    with scope.share(scope.count(node.operands[0])) as t, f.loop(0, heads) as head:
        source = scope.row_address(node.operands[0], t).at(head * (4 * head_dim))
        out = scope.row_address(node.result.name, t).at(head * (4 * head_dim))
        vectors = [_load_part(scope, source.at(4 * at), size) for at, size in ends]
        total = lanes.zero()
        for vector in vectors:
            total = lanes.fma(vector, vector, total)
        root = f.overloaded("sqrt", lanes.tree(total) / float(head_dim) + node.real("eps"))
        scale = lanes.splat(f.const("float", 1.0) / root)
        for (at, size), vector in zip(ends, vectors, strict=True):
            made = vector * scale * f.load(F32, weight.at(4 * at))
            _store_part(scope, made, out.at(4 * at), size)


def _load_part(scope: Scope, place: Value, size: int) -> Value:
    """A vector of `size` floats; the lanes beyond them are zero, and not read."""
    f = scope.f
    if size == LANES:
        return f.load(F32, place)
    slot = f.variable(F32, 0.0)
    for lane in range(size):
        f.store(f.load("float", place.at(4 * lane)), Value(f, slot.text, "ptr").at(4 * lane))
    return slot.get()


def _store_part(scope: Scope, values: Value, place: Value, size: int) -> None:
    """The first `size` lanes, which others may lie right behind."""
    if size == LANES:
        scope.f.store(values, place)
        return
    for lane in range(size):
        scope.f.store(scope.f.extract(values, lane), place.at(4 * lane))


def lower_select(scope: Scope, node: Node) -> None:
    """Copy the rows whose logits, or whose states, are wanted."""
    source, wanted = node.operands
    field = "pooled" if scope.types[wanted].shape == ("E",) else "rows"
    with scope.share(scope.count(node.result.name)) as r:
        origin = scope.row_address(source, scope.f.widen(scope.element(field, r)))
        out = scope.row_address(node.result.name, r)
        copy_row(scope, origin, out, scope.buffers[source].stride)


def copy_row(scope: Scope, origin: Value, out: Value, size: int) -> None:
    """Copy a row of `size` bytes, a multiple of 64."""
    with scope.f.loop(0, size, 64) as at:
        scope.f.store(scope.f.load(F32, origin.at(at), 64), out.at(at), 64)


def lower_elementwise(scope: Scope, node: Node) -> None:
    """add, mul, silu, round and their like on values that lie in memory."""
    f = scope.f
    epilogue = Epilogue(nodes=node.leaves, visible=frozenset(v.name for v in node.results))
    with scope.share(scope.count(node.operands[0])) as t:
        width = pairs_of(scope.buffers[node.results[0].name])
        with f.loop(0, width) as pair:
            epilogue.run(scope, {}, t, pair)


def lower_rope(scope: Scope, node: Node) -> None:
    """A rotation that is not fused with its linear: features in their own order."""
    f = scope.f
    head_dim = node.integer("head_dim")
    half = head_dim // 2
    half_bytes = 2 * padded_head(head_dim)
    table = scope.angles(node)
    heads = int(node.result.type.shape[1]) // head_dim
    with scope.share(scope.count(node.operands[0])) as t:
        source = scope.row_address(node.operands[0], t)
        out = scope.row_address(node.result.name, t)
        angles = table.at(f.widen(scope.element("positions", t)) * (2 * half_bytes))
        with f.loop(0, heads) as head, f.loop(0, half) as d:
            low_at = head * (4 * head_dim) + d * 4
            low, high = (
                f.load("float", source.at(low_at)),
                f.load("float", source.at(low_at).at(4 * half)),
            )
            cos = f.load("float", angles.at(d * 4))
            sin = f.load("float", angles.at(half_bytes).at(d * 4))
            f.store(low * cos - high * sin, out.at(low_at))
            f.store(high * cos + low * sin, out.at(low_at).at(4 * half))


def lower_kv_write(scope: Scope, node: Node) -> None:
    """A cache write that is not fused: each head is brought into stored order first."""
    f = scope.f
    head_dim, to = node.integer("head_dim"), node.string("to")
    heads, stored = int(node.result.type.shape[0]), padded_head(head_dim)
    slot = f.variable(f"<{stored} x float>")
    scratch = Value(f, slot.text, "ptr")
    with scope.share(scope.load("T")) as t, f.loop(0, heads) as head:
        for field, name in zip(("keys", "values"), node.operands[:2], strict=True):
            source = scope.row_address(name, t).at(head * (4 * head_dim))
            _store_head(scope, source, scratch, stored_dims(head_dim, is_turned=field == "keys"))
            place = token_head(scope, field, t, head, node)
            with f.loop(0, stored // PAIR_ROWS) as pair:
                values = load_pair(scope, scratch, pair)
                if field == "keys":
                    store_keys(scope, values, place, pair, t, to)
                else:
                    store_values(scope, values, place, pair, t, head_dim, to)


def _store_head(scope: Scope, source: Value, scratch: Value, dims: npt.NDArray[np.intp]) -> None:
    """Copy one head from its own order to stored order, element by element."""
    f = scope.f
    for place, dim in enumerate(dims.tolist()):
        value = f.load("float", source.at(4 * dim)) if dim >= 0 else f.const("float", 0.0)
        f.store(value, scratch.at(4 * place))

"""Random legal graphs with weights: of Llama's shape, and of shapes that no model has.

A layer is a chain of moves; each takes values of shape [T, hidden] from a pool and adds one. What
is drawn where numbers matter (inputs of attention, factors) is normed, so that a case is well
conditioned: its result must not turn on the last bit of a sum.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count

import numpy as np
from hypothesis import strategies as st

from tokenmill.ir.build import FunctionBuilder, finish_graph
from tokenmill.ir.formats import FORMATS, Weight, quantize
from tokenmill.ir.graph import Graph, Value
from tokenmill.ir.low_rank import LowRank
from tokenmill.ir.text import print_graph
from tokenmill.passes.pipeline import numeric_passes, run_passes

HEAD_DIMS = (8, 10, 16, 20, 24, 32, 36, 40, 64, 80, 96, 128)
VOCAB_SIZES = (16, 100, 257, 515)


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A graph as a model file builds it, its weights, and the numbers it is to be computed in."""

    graph: Graph
    weights: Mapping[str, Weight]
    activations: str
    cache: str
    vocab_size: int
    adapters: tuple[Mapping[str, LowRank], ...] = ()

    def __repr__(self) -> str:
        return f"Case({self.activations}, cache {self.cache}, {self.vocab_size} tokens)\n" + (
            print_graph(self.numeric)
        )

    def _repr_pretty_(self, printer: object, cycle: bool) -> None:
        """How hypothesis shows the case among the arguments of a test that fails."""
        printer.text(repr(self).partition("\n")[0])  # type: ignore[attr-defined]

    @property
    def formats(self) -> dict[str, str]:
        kinds = self.graph.weights()
        return {n: w.format for n, w in self.weights.items() if kinds[n].dtype == "w"}

    @property
    def window(self) -> int:
        """The widest of caches that keep only a window; 0: there is none."""
        writes = [n for f in self.graph.functions for n in f.nodes if n.op == "kv_write"]
        return max(
            (int(n.result.type.shape[2]) for n in writes if len(n.result.type.shape) > 2), default=0
        )

    @property
    def is_exact(self) -> bool:
        """Whether nothing is rounded on the way but float32 results."""
        return self.activations == "f32" and self.cache == "f32"

    @cached_property
    def numeric(self) -> Graph:
        """The graph after the passes that decide the numbers."""
        passes = numeric_passes(
            formats=self.formats, activations=self.activations, cache=self.cache
        )
        return run_passes(self.graph, passes)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    hidden: int
    inner: int
    head_dim: int
    kv_heads: int

    @property
    def kv_size(self) -> int:
        return self.head_dim * self.kv_heads


@dataclass
class Layer:
    """A function being drawn: its builder, the values at hand, and its cache once written."""

    draw: st.DrawFn
    f: FunctionBuilder
    sizes: Sizes
    place: Value
    pool: list[Value]
    kv: Value | None = None
    numbers: "count[int]" = field(default_factory=count)
    matrices: dict[tuple[int, int], str] = field(default_factory=dict)

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def choose(self, options: Sequence[str]) -> str:
        return self.draw(st.sampled_from(options))

    def pick(self) -> Value:
        return self.draw(st.sampled_from(self.pool))

    def normed(self) -> Value:
        """A norm of a value at hand; a norm that was made before may come again."""
        x = self.pick()
        weight = self.f.weight(f"norm{next(self.numbers)}", self.sizes.hidden)
        h = self.f.rmsnorm(x, weight, eps=1e-5)
        if self.flag():
            self.pool.append(h)
        return h

    def linear(self, x: Value, size: int) -> Value:
        """A linear, with a bias or without; now and then its weight is that of another."""
        number, shape = next(self.numbers), (size, int(x.type.shape[1]))
        if shape not in self.matrices or self.draw(st.integers(0, 7)):
            self.matrices[shape] = f"w{number}"
        bias = self.f.weight(f"b{number}", size) if self.flag() else None
        return self.f.linear(x, self.f.weight(self.matrices[shape], *shape), bias)

    def sum(self, a: Value, b: Value) -> Value:
        return self.f.add(a, b) if self.flag() else self.f.add(b, a)

    def heads(self, x: Value) -> Value:
        """x, its heads normed or not, turned or not."""
        d = self.sizes.head_dim
        if not self.draw(st.integers(0, 2)):
            weight = self.f.weight(f"head_norm{next(self.numbers)}", d)
            x = self.f.head_norm(x, weight, head_dim=d, eps=1e-5)
        match self.choose(("none", "plain", "plain", "scaled")):
            case "none":
                return x
            case "plain":
                return self.f.rope(x, self.place, head_dim=d, theta=10000.0)
            case _:  # pairs that turn backwards, slowly, or not at all
                turns = tuple(float(np.float32((-0.5) ** i)) * (i % 3 > 0) for i in range(d // 2))
                return self.f.rope(x, self.place, head_dim=d, frequencies=turns, magnitude=1.25)


def attend(layer: Layer) -> Value:
    """Attention; the first one writes the cache, and others read the same."""
    f, sizes = layer.f, layer.sizes
    h = layer.normed()
    if layer.kv is None:
        other = h if layer.draw(st.integers(0, 3)) else layer.normed()
        k = layer.heads(layer.linear(other, sizes.kv_size))
        v = layer.linear(other, sizes.kv_size) if layer.draw(st.integers(0, 5)) else k
        kept = layer.draw(st.sampled_from((0, 0, 0, 1, 20, 260)))
        layer.kv = f.kv_write(k, v, layer.place, head_dim=sizes.head_dim, window=kept)
    group = layer.draw(st.integers(1, max(1, min(8, 640 // sizes.kv_size))))
    q_size = group * sizes.kv_size
    is_direct = q_size == sizes.hidden and layer.flag()
    q = layer.heads(h if is_direct else layer.linear(h, q_size))
    windows = (0, 0, 1, 7, 16, 33, 260)
    if len(layer.kv.type.shape) > 2:
        kept = layer.kv.type.width
        windows = (kept, *(w for w in windows if 0 < w < kept))
    out = f.attention(
        q,
        layer.kv,
        layer.place,
        head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5,
        window=layer.draw(st.sampled_from(windows)),
        softcap=layer.draw(st.sampled_from((0.0, 0.0, 1.5, 50.0))),
    )
    return layer.sum(layer.pick(), layer.linear(out, sizes.hidden))


def gate(layer: Layer) -> Value:
    """A gated MLP, or something like one."""
    f, inner = layer.f, layer.sizes.inner
    h = layer.normed() if layer.draw(st.integers(0, 3)) else layer.pick()
    kinds = ("silu", "silu", "gelu", "gelu", "swapped", "no silu", "twice", "two inputs")
    match layer.choose(kinds):
        case "silu":
            y = f.mul(f.silu(layer.linear(h, inner)), layer.linear(h, inner))
        case "gelu":
            y = f.mul(f.gelu(layer.linear(h, inner)), layer.linear(h, inner))
        case "swapped":
            y = f.mul(layer.linear(h, inner), f.silu(layer.linear(h, inner)))
        case "no silu":
            y = f.mul(
                f.rmsnorm(layer.linear(h, inner), f.weight("inner_norm", inner), eps=1e-6),
                layer.linear(h, inner),
            )
        case "twice":
            s = f.silu(layer.linear(h, inner))
            y = f.add(f.mul(s, f.silu(layer.linear(h, inner))), s)
        case _:
            y = f.mul(f.silu(layer.linear(h, inner)), layer.linear(layer.normed(), inner))
    out = layer.linear(y, layer.sizes.hidden)
    match layer.choose(("plain", "plain", "scaled", "capped", "normed")):
        case "scaled":
            out = f.scale(out, 0.25)
        case "capped":
            out = f.scale(f.softcap(out, 3.0), 2.0)
        case "normed":
            out = f.rmsnorm(out, f.weight("post_norm", layer.sizes.hidden), eps=1e-6)
    return layer.sum(layer.pick(), out) if layer.flag() else out


def linears(layer: Layer) -> Value:
    """Several linears of one input."""
    h, hidden = layer.normed(), layer.sizes.hidden
    return layer.sum(layer.linear(h, hidden), layer.linear(h, hidden))


def experts(layer: Layer) -> Value:
    """A mixture of experts, gated or not."""
    f, hidden, inner = layer.f, layer.sizes.hidden, layer.sizes.inner
    count = layer.draw(st.integers(1, 9))
    h, number = layer.normed(), next(layer.numbers)
    routes = f.route(
        layer.linear(h, count),
        top_k=layer.draw(st.integers(1, min(count, 3))),
        renormalize=layer.flag(),
    )
    groups = f.group(routes)
    x = f.dispatch(h, groups)

    def linear(name: str, x: Value, size: int) -> Value:
        weight = f.weight(f"{name}{number}", count * size, int(x.type.shape[-1]))
        return f.expert_linear(x, weight, groups)

    y = f.silu(linear("expert_gate", x, inner))
    if layer.draw(st.integers(0, 3)):
        y = f.mul(y, linear("expert_up", x, inner))
    return layer.sum(layer.pick(), f.combine(linear("expert_down", y, hidden), routes, groups))


def elementwise(layer: Layer) -> Value:
    kinds = ("add", "mul", "silu", "gelu", "gelu_erf", "scale", "softcap", "norm", "layer_norm")
    match layer.choose(kinds):
        case "add":
            return layer.f.add(layer.pick(), layer.pick())
        case "mul":
            return layer.f.mul(layer.normed(), layer.pick())
        case "silu":
            return layer.f.silu(layer.pick())
        case "gelu":
            return layer.f.gelu(layer.pick())
        case "gelu_erf":
            h = layer.pick()
            return layer.f.gelu_erf(layer.linear(h, layer.sizes.hidden) if layer.flag() else h)
        case "layer_norm":
            number, size = next(layer.numbers), layer.sizes.hidden
            weight, bias = (layer.f.weight(f"ln{number}{end}", size) for end in ("", "_bias"))
            return layer.f.layer_norm(layer.pick(), weight, bias, eps=1e-5)
        case "scale":
            return layer.f.scale(layer.pick(), -1.5)
        case "softcap":
            return layer.f.softcap(layer.pick(), 2.0)
        case _:
            return layer.normed()


MOVES: tuple[Callable[[Layer], Value], ...] = (
    *(attend, gate, experts, attend, gate, linears, elementwise),
)


def draw_layer(layer: Layer, *, is_llama: bool) -> Value:
    """The moves of a layer, and the value that it returns."""
    if is_llama:
        return llama_layer(layer)
    for _ in range(layer.draw(st.integers(1, 4))):
        layer.pool.append(layer.draw(st.sampled_from(MOVES))(layer))
    result = layer.pool[-1] if layer.draw(st.integers(0, 3)) else layer.pick()
    # A layer that returns its own parameter would be no layer.
    return layer.f.add(result, result) if result is layer.pool[0] else result


def llama_layer(layer: Layer) -> Value:
    f, sizes, place = layer.f, layer.sizes, layer.place
    x, d = layer.pool[0], sizes.head_dim
    group = layer.draw(st.integers(1, max(1, min(8, 640 // sizes.kv_size))))
    h = f.rmsnorm(x, f.weight("attn_norm", sizes.hidden), eps=1e-5)
    q = layer.linear(h, group * sizes.kv_size)
    k, v = layer.linear(h, sizes.kv_size), layer.linear(h, sizes.kv_size)
    q, k = (f.rope(t, place, head_dim=d, theta=500000.0) for t in (q, k))
    kv = f.kv_write(k, v, place, head_dim=d)
    out = f.attention(q, kv, place, head_dim=d, scale=d**-0.5)
    x = f.add(x, layer.linear(out, sizes.hidden))
    h = f.rmsnorm(x, f.weight("ffn_norm", sizes.hidden), eps=1e-5)
    inner = f.mul(f.silu(layer.linear(h, sizes.inner)), layer.linear(h, sizes.inner))
    return f.add(x, layer.linear(inner, sizes.hidden))


@st.composite
def sizes_of(draw: st.DrawFn) -> Sizes:
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    kv_heads = draw(st.integers(1, max(1, min(4, 256 // head_dim))))
    # Now and then attention may read a value of the hidden size as its queries.
    hidden = st.integers(8, 160) | st.sampled_from((32, 64, 128, head_dim * kv_heads))
    return Sizes(
        hidden=draw(hidden), inner=draw(st.integers(8, 200)), head_dim=head_dim, kv_heads=kv_heads
    )


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """A step: tokens to logits and samples."""
    sizes, vocab_size = draw(sizes_of()), draw(st.sampled_from(VOCAB_SIZES))
    is_llama = draw(st.booleans())
    f = FunctionBuilder("main")
    tokens, place = f.param("tokens", "i32", "T"), f.param("place", "place", "T")
    rows, sampling = f.param("rows", "i32", "R"), f.param("sampling", "sampling", "R")
    table = f.weight("embed", vocab_size, sizes.hidden)
    x = f.embed(tokens, table)
    if not is_llama and not draw(st.integers(0, 3)):
        x = draw_layer(_layer(draw, f, sizes, x, place), is_llama=False)
    x = f.repeat_kinds(
        draw(st.lists(st.sampled_from((0, 0, 1)), min_size=1, max_size=3)),
        lambda g, kind, x, p: draw_layer(_layer(draw, g, sizes, x, p), is_llama=is_llama),
        x,
        place,
    )
    x = f.select_rows(x, rows)
    if is_llama or draw(st.booleans()):
        x = f.rmsnorm(x, f.weight("final_norm", sizes.hidden), eps=1e-5)
    is_tied = draw(st.booleans())
    head = table if is_tied else f.weight("lm_head", vocab_size, sizes.hidden)
    bias = f.weight("head_bias", vocab_size) if not is_tied and draw(st.booleans()) else None
    logits = f.linear(x, head, bias)
    if not is_llama and draw(st.booleans()):
        logits = f.softcap(f.scale(logits, 0.5), 4.0)
    # A value that is returned beside the logits must stay a value of its own.
    extra = [x] if not is_llama and draw(st.booleans()) else []
    return finish_graph("random", f, logits, f.sample(logits, sampling), *extra)


def _layer(draw: st.DrawFn, f: FunctionBuilder, sizes: Sizes, x: Value, place: Value) -> Layer:
    return Layer(draw=draw, f=f, sizes=sizes, place=place, pool=[x])


@st.composite
def cases(draw: st.DrawFn, activations: Sequence[str] = ("f32", "bf16", "int8")) -> Case:
    """A graph, its weights in one format or in mixed ones, and the numbers to compute in."""
    graph = draw(graphs())
    formats = draw(st.lists(st.sampled_from(list(FORMATS)), min_size=1, max_size=4, unique=True))
    vocab_size = int(graph.weights()["embed"].shape[0])
    return Case(
        graph=graph,
        weights=random_weights(graph, formats, seed=draw(st.integers(0, 2**32 - 1))),
        activations=draw(st.sampled_from(list(activations))),
        cache=draw(st.sampled_from(("f32", "bf16", "int8"))),
        vocab_size=vocab_size - draw(st.sampled_from((0, 0, 3))),
    )


def random_weights(graph: Graph, formats: Sequence[str], *, seed: int) -> dict[str, Weight]:
    """Weights that keep the size of what goes through them, by full name.

    One whose format is not chosen yet gets one of `formats`; all depend on name and seed only.
    """
    weights = {}
    for name, kind in graph.weights().items():
        rng = np.random.default_rng([seed, *name.encode()])
        *n, k = (int(d) for d in kind.shape)
        values = rng.standard_normal((*n, k), np.float32)
        if n:
            scaled = values if name == "embed" else values / np.float32(np.sqrt(k))
            chosen = str(rng.choice(formats)) if kind.dtype == "w" else kind.dtype
            weights[name] = quantize(scaled, chosen)
        else:
            weights[name] = Weight(format="f32", quants=1 + values[None] / 4)
    return weights

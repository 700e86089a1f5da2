"""Rotary frequencies of models that were stretched beyond the context they were trained with.

Everything is computed in float32, in the order in which the models' own code does, since an error
of a last bit grows with the position.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, floor, log, pi, sqrt

import numpy as np
import numpy.typing as npt

from tokenmill.ir.numerics import rope_frequencies
from tokenmill.ir.order import F32Array
from tokenmill.models.config import Rope
from tokenmill.models.fields import Fields


@dataclass(frozen=True, kw_only=True)
class Head:
    """What rotary frequencies depend on beside the scaling."""

    dim: int  # dimensions that turn
    theta: float
    context_length: int


def hf_rope(fields: Fields, head: Head) -> Rope:
    """The rope of config.json: `rope_theta` and `rope_scaling`, or newer `rope_parameters`.

    `head.theta` is used where the file gives none.
    """
    theta = fields.number("rope_theta", most=1e12, default=head.theta)
    trained = "original_max_position_embeddings"  # Phi-3 has it outside
    for key in ("rope_scaling", "rope_parameters"):
        rope = fields.values.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise fields.wrong(key, rope, "an object")
        inner = Fields(f"{fields.where}: {key}", {trained: fields.values.get(trained), **rope})
        theta = inner.number("rope_theta", most=1e12, default=theta)
        return scaled_rope(
            inner, Head(dim=head.dim, theta=theta, context_length=head.context_length)
        )
    return Rope(theta=theta)


def scaled_rope(fields: Fields, head: Head) -> Rope:
    """The rope of one `rope_scaling` object."""
    key = "rope_type" if fields.values.get("rope_type") is not None else "type"
    kind = fields.text(key, default="default")
    if kind == "default":
        return Rope(theta=head.theta)
    if kind not in _SCALINGS:
        raise fields.unsupported(key, kind, " or ".join(map(repr, ("default", *_SCALINGS))))
    return _SCALINGS[kind](fields, head)


def gguf_rope(fields: Fields, prefix: str, head: Head) -> Rope:
    """The rope of GGUF metadata, `<prefix>.rope.*`."""
    p = f"{prefix}.rope"
    kind = fields.text(f"{p}.scaling.type", default="linear")
    if kind not in ("none", "linear", "yarn"):
        raise fields.unsupported(f"{p}.scaling.type", kind, "'none' or 'linear' or 'yarn'")
    factor = fields.number(f"{p}.scaling.factor", most=1e6, default=1.0)
    factor = fields.number(f"{p}.scale_linear", most=1e6, default=factor)
    if kind == "none" or factor == 1:
        return Rope(theta=head.theta)
    names = {
        "original_max_position_embeddings": f"{p}.scaling.original_context_length",
        "beta_fast": f"{p}.scaling.yarn_beta_fast",
        "beta_slow": f"{p}.scaling.yarn_beta_slow",
    }
    given = {name: fields.values.get(key) for name, key in names.items()}
    given |= {"rope_type": kind, "factor": factor}
    grown = fields.number(f"{p}.scaling.attn_factor", most=1e3, default=1.0)
    rope = scaled_rope(Fields(f"{fields.where}: {p}", given), head)
    return replace(rope, magnitude=rope.magnitude * grown)


def divided_rope(head: Head, divisors: F32Array, beyond: F32Array | None = None) -> Rope:
    """Frequencies divided by what a GGUF file lists for each pair, as Llama 3's do.

    `beyond`: what those of LongRoPE's texts beyond the first context are divided by.
    """
    rope = Rope(theta=head.theta, frequencies=_plain(_unscaled(head) / divisors))
    return rope if beyond is None else replace(rope, beyond=divided_rope(head, beyond))


def partial_rope(rope: Rope, head: Head, head_dim: int) -> Rope:
    """The rope of heads of which only the first pairs turn: the others have frequency 0."""
    if head.dim == head_dim:
        return rope
    turning = rope.frequencies or _plain(rope_frequencies(head.dim, rope.theta))
    still = (0.0,) * ((head_dim - head.dim) // 2)
    beyond = partial_rope(rope.beyond, head, head_dim) if rope.beyond else None
    return replace(rope, frequencies=turning + still, beyond=beyond)


def _unscaled(head: Head) -> F32Array:
    return rope_frequencies(head.dim, head.theta)


def _plain(frequencies: npt.NDArray[np.floating]) -> tuple[float, ...]:
    return tuple(map(float, frequencies.astype(np.float32)))


def _linear(fields: Fields, head: Head) -> Rope:
    """Positions closer together (Chen et al. 2023)."""
    factor = np.float32(fields.number("factor", most=1e6))
    return Rope(theta=head.theta, frequencies=_plain(_unscaled(head) / factor))


def _llama3(fields: Fields, head: Head) -> Rope:
    """Llama 3.1: slow pairs are slowed by a factor, fast ones kept, those between in between."""
    factor = np.float32(fields.number("factor", most=1e6))
    low = np.float32(fields.number("low_freq_factor", most=1e6))
    high = np.float32(fields.number("high_freq_factor", most=1e6))
    length = fields.integer("original_max_position_embeddings", most=2**30)
    if low >= high:
        raise fields.wrong("low_freq_factor", float(low), f"less than high_freq_factor {high:g}")
    plain = _unscaled(head)
    wavelengths = np.float32(2 * pi) / plain
    share = (np.float32(length) / wavelengths - low) / (high - low)
    between = (np.float32(1) - share) * plain / factor + share * plain
    slow = np.where(wavelengths > length / low, plain / factor, plain)
    is_between = (wavelengths >= length / high) & (wavelengths <= length / low)
    return Rope(theta=head.theta, frequencies=_plain(np.where(is_between, between, slow)))


def _yarn(fields: Fields, head: Head) -> Rope:
    """YaRN (Peng et al. 2023): pairs that turn often are kept, the others slowed."""
    factor = fields.number("factor", most=1e6)
    length = fields.integer(
        "original_max_position_embeddings", most=2**30, default=head.context_length
    )
    magnitude = fields.number("attention_factor", most=1e3, default=_yarn_magnitude(fields, factor))
    edges: list[float] = []
    for key, turns in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        turns = fields.number(key, most=1e6, default=turns)
        edges.append(head.dim * log(length / (turns * 2 * pi)) / (2 * log(head.theta)))
    if fields.flag("truncate", default=True):
        edges = [floor(edges[0]), ceil(edges[1])]
    low, high = max(edges[0], 0), min(edges[1], head.dim - 1)
    pairs = np.arange(head.dim // 2, dtype=np.float32)
    ramp = (pairs - np.float32(low)) / np.float32(max(high - low, 0.001))
    kept = np.float32(1) - np.clip(ramp, 0, 1)
    plain = _unscaled(head)
    slowed = np.float32(1) / (np.float32(factor) * (np.float32(1) / plain))
    frequencies = slowed * (np.float32(1) - kept) + plain * kept
    return Rope(theta=head.theta, frequencies=_plain(frequencies), magnitude=magnitude)


def _yarn_magnitude(fields: Fields, factor: float) -> float:
    """0.1 ln(factor) + 1; DeepSeek's models have one such term over another."""

    def term(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * log(factor) + 1.0

    if not (fields.values.get("mscale") and fields.values.get("mscale_all_dim")):
        return term(1.0)
    above, below = (fields.number(key, most=1e3) for key in ("mscale", "mscale_all_dim"))
    return term(above) / term(below)


def _longrope(fields: Fields, head: Head) -> Rope:
    """LongRoPE (Ding et al. 2024): a list of factors for texts within the model's first context,
    and another one, `beyond`, for longer texts. See `ModelConfig.stretched_to`.
    """
    length = fields.integer("original_max_position_embeddings", most=2**30, least=2)
    factor = fields.number("factor", most=1e6, default=head.context_length / length)
    magnitude = 1.0 if factor <= 1 else sqrt(1 + log(factor) / log(length))
    magnitude = fields.number("attention_factor", most=1e3, default=magnitude)
    ropes = []
    for key in ("short_factor", "long_factor"):
        factors = np.array(fields.numbers(key, head.dim // 2), np.float32)
        slowed = _plain(np.float32(1) / (factors * (np.float32(1) / _unscaled(head))))
        ropes.append(Rope(theta=head.theta, frequencies=slowed, magnitude=magnitude))
    return replace(ropes[0], num_positions=length, beyond=ropes[1])


_SCALINGS: dict[str, Callable[[Fields, Head], Rope]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
}

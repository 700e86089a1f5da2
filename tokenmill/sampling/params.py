"""Sampling parameters of a request: what a user may ask for, checked at the door."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from tokenmill.errors import UsageError

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: float32 logits divided by less would overflow."""

_UINT64 = 2**64
_FLOAT_RANGES = {
    # field: least, greatest
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
_INT_RANGES = {
    "top_k": (-1, 2**31 - 1),
    "seed": (-(2**63), _UINT64 - 1),
    "max_tokens": (1, 2**31 - 1),
}
_OPTIONAL = ("seed", "max_tokens")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop; names and meanings are those of vLLM.

    `top_k` 0 or -1, `top_p` 1 and `min_p` 0 are off. `seed` None draws a new seed for each
    request. `max_tokens` None goes on to the end of the context. `stop` strings end the text
    before themselves; a stop token, like the end-of-sequence token, is the last of the token ids
    and not in the text. Raises UsageError that names the field, its value and what is allowed.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name, (least, greatest) in _FLOAT_RANGES.items():
            _check_float(name, getattr(self, name), least, greatest)
        if self.top_p == 0:
            raise UsageError("top_p is 0, but must be above 0, at most 1")
        for name, (lowest, highest) in _INT_RANGES.items():
            _check_int(name, getattr(self, name), lowest, highest)
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} is {getattr(self, name)!r}, but must be True or False")
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        object.__setattr__(self, "stop_token_ids", _checked_token_ids(self.stop_token_ids))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def sequence_seed(seed: int | None, index: int) -> int:
    """The 64-bit seed of a request's sequence `index`; None draws one from the system.

    The index is mixed in so that several sequences of one request differ, by the finaliser of
    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    if seed is None:
        return int.from_bytes(os.urandom(8), "little")
    mixed = (seed + (index + 1) * 0x9E3779B97F4A7C15) % _UINT64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % _UINT64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % _UINT64
    return mixed ^ (mixed >> 31)


def _check_float(name: str, value: object, least: float, greatest: float) -> None:
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and least <= value <= greatest
    ):
        return  # a NaN fails both comparisons
    raise UsageError(f"{name} is {value!r}, but must be a number from {least:g} to {greatest:g}")


def _check_int(name: str, value: object, lowest: int, highest: int) -> None:
    if value is None and name in _OPTIONAL:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        or_none = ", or None" if name in _OPTIONAL else ""
        raise UsageError(
            f"{name} is {value!r}, but must be a whole number from {lowest} to {highest}{or_none}"
        )


def _checked_stop(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) and s for s in strings):
        raise UsageError(f"stop is {stop!r}, but must be a string or a list of strings, none empty")
    return tuple(strings)


def _checked_token_ids(token_ids: object) -> tuple[int, ...]:
    if not isinstance(token_ids, Sequence) or not all(
        isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in token_ids
    ):
        raise UsageError(f"stop_token_ids is {token_ids!r}, but must be a list of token ids")
    return tuple(token_ids)

"""Sampling parameters of a request: what a user may ask for, checked at the door."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

from tokenmill.errors import UsageError
from tokenmill.sampling.checks import (
    check_bool,
    check_float,
    check_int,
    checked_biases,
    checked_strings,
    checked_token_ids,
)

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: float32 logits divided by less would overflow."""

MAX_LOGPROBS = 20
"""How many of the most likely tokens can be reported for a position."""

_UINT64 = 2**64
FLOAT_RANGES = {
    # field: least, greatest
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
INT_RANGES = {
    "top_k": (-1, 2**31 - 1),
    "n": (1, 1024),
    "max_tokens": (1, 2**31 - 1),
    "min_tokens": (0, 2**31 - 1),
    "seed": (-(2**63), _UINT64 - 1),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "truncate_prompt_tokens": (-1, 2**31 - 1),
}
_OPTIONAL = ("seed", "max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens")
_BOOLS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")

_GENERATION_CONFIG_FIELDS = {
    # field of generation_config.json: ours
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop; names and meanings are those of vLLM.

    `n` samples are drawn from one prompt. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 are off. `seed`
    None draws a new seed for each request. `max_tokens` None goes on to the end of the context; no
    end or stop is heeded before `min_tokens`. `stop` strings end the text before themselves; a
    stop token, like the end-of-sequence token, is the last of the token ids and not in the text;
    `include_stop_str_in_output` leaves both in. `logprobs` k reports the sampled token and the k
    most likely ones at each position, `prompt_logprobs` those of the prompt. `logit_bias` is added
    to the logits of single ids; only `allowed_token_ids` are sampled, and never one that completes
    a text of `bad_words`. `truncate_prompt_tokens` k keeps the last k tokens of the prompt, -1 as
    many as the context has room for beside one token of an answer.
    Raises UsageError that names the field, its value and what is allowed.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, (least, greatest) in FLOAT_RANGES.items():
            check_float(name, getattr(self, name), least, greatest)
        if self.top_p == 0:
            raise UsageError("top_p is 0, but must be above 0, at most 1")
        for name, (lowest, highest) in INT_RANGES.items():
            check_int(name, getattr(self, name), lowest, highest, is_optional=name in _OPTIONAL)
        for name in _BOOLS:
            check_bool(name, getattr(self, name))
        self._check_together()
        for name, value in (
            ("stop", checked_strings("stop", self.stop)),
            ("bad_words", checked_strings("bad_words", self.bad_words)),
            ("stop_token_ids", checked_token_ids("stop_token_ids", self.stop_token_ids)),
        ):
            object.__setattr__(self, name, value)
        if self.logit_bias is not None:
            biases = MappingProxyType(checked_biases(self.logit_bias))
            object.__setattr__(self, "logit_bias", biases)
        if self.allowed_token_ids is not None:
            allowed = checked_token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise UsageError("allowed_token_ids is empty, but must hold at least one token id")
            object.__setattr__(self, "allowed_token_ids", allowed)

    def __hash__(self) -> int:
        biases = self.logit_bias and tuple(sorted(self.logit_bias.items()))
        return hash((*(vars(self) | {"logit_bias": biases}).values(),))

    @classmethod
    def with_defaults(
        cls,
        generation_config: Mapping[str, object],
        fallback: Mapping[str, object] | None = None,
        /,
        **given: object,
    ) -> Self:
        """Parameters from what is given, then a model's generation_config.json, then `fallback`.

        What none of them says is as in a SamplingParams that is made without it.
        Fields of that file which are no sampling parameters, or null, are passed over. Raises
        UsageError as the constructor does, and says so where the file is to blame.
        """
        defaults = {
            ours: generation_config[theirs]
            for theirs, ours in _GENERATION_CONFIG_FIELDS.items()
            if generation_config.get(theirs) is not None
        }
        try:
            cls(**defaults)  # type: ignore[arg-type]  # it checks them itself
        except UsageError as error:
            raise UsageError(f"the model's generation_config.json: {error}") from None
        return cls(**{**(fallback or {}), **defaults, **given})  # type: ignore[arg-type]

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UsageError(
                f"min_tokens is {self.min_tokens}, but must be at most max_tokens, which is "
                f"{self.max_tokens}"
            )
        if self.truncate_prompt_tokens == 0:
            raise UsageError("truncate_prompt_tokens is 0, but must be -1 or at least 1")


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

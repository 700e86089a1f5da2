"""Which tokens a request wants more, less or never: biases, bad words, a minimum length."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tokenmill.backends.base import U32Array

FORBIDDEN = float("-inf")


@dataclass(frozen=True, kw_only=True)
class LogitRules:
    """The rules of one sequence; see SamplingParams for what they mean.

    `bad_words` are token ids; one of a single token is among `always`. `allowed` is a bit mask of
    the vocabulary, [ceil(vocab_size / 32)], None where everything is allowed.
    """

    always: Mapping[int, float]
    end_ids: frozenset[int]
    min_tokens: int
    bad_words: tuple[tuple[int, ...], ...]
    allowed: U32Array | None

    @property
    def has_biases(self) -> bool:
        return bool(self.always or self.min_tokens or self.bad_words)

    @property
    def needs_tokens(self) -> bool:
        """Do the biases depend on what has been sampled?"""
        return bool(self.bad_words)

    def biases(self, output: Sequence[int], num_output: int) -> Mapping[int, float]:
        """What to add to the logits of the token that follows `num_output` others.

        `output` are these tokens; without `needs_tokens` it may lack some.
        """
        is_early = num_output < self.min_tokens
        forbidden = [*(self.end_ids if is_early else ()), *self._completions(output)]
        if not forbidden:
            return self.always
        return {**self.always, **dict.fromkeys(forbidden, FORBIDDEN)}

    def _completions(self, output: Sequence[int]) -> Iterator[int]:
        """Tokens that would complete a bad word."""
        for word in self.bad_words:
            begun = len(word) - 1
            if begun <= len(output) and tuple(output[len(output) - begun :]) == word[:-1]:
                yield word[-1]


NO_RULES = LogitRules(always={}, end_ids=frozenset(), min_tokens=0, bad_words=(), allowed=None)


def make_rules(
    *,
    logit_bias: Mapping[int, float] | None,
    allowed_token_ids: Iterable[int] | None,
    bad_words: Iterable[Sequence[int]],
    min_tokens: int,
    end_ids: frozenset[int],
    vocab_size: int,
) -> LogitRules:
    """The rules, in the form in which a step needs them; all ids are within the vocabulary."""
    words = [tuple(word) for word in bad_words if word]
    always = dict(logit_bias or {})
    always |= {word[0]: FORBIDDEN for word in words if len(word) == 1}
    return LogitRules(
        always=always,
        end_ids=end_ids,
        min_tokens=min_tokens if end_ids else 0,
        bad_words=tuple(word for word in words if len(word) > 1),
        allowed=None if allowed_token_ids is None else _bit_mask(allowed_token_ids, vocab_size),
    )


def bad_word_ids(words: Iterable[str], encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Each word as the tokens it has in the middle of a text, after a space and without one."""
    found = []
    for word in words:
        plain = word.lstrip()
        found += [encode(plain), encode(" " + plain)]
    return [list(ids) for ids in dict.fromkeys(map(tuple, found)) if ids]


def _bit_mask(ids: Iterable[int], vocab_size: int) -> U32Array:
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)

"""Biases, bad words and minimum lengths as a step sees them."""

import math

import numpy as np

from tokenmill.sampling.logit_rules import NO_RULES, LogitRules, bad_word_ids, make_rules

NEVER = -math.inf


def rules(**changes: object) -> LogitRules:
    plain = {
        "logit_bias": None,
        "allowed_token_ids": None,
        "bad_words": (),
        "min_tokens": 0,
        "end_ids": frozenset({2}),
        "vocab_size": 70,
    }
    return make_rules(**{**plain, **changes})


def test_without_rules_there_are_no_biases() -> None:
    assert not rules().has_biases
    assert not NO_RULES.has_biases
    assert rules().biases([], 0) == {}


def test_biases_are_always_there() -> None:
    assert rules(logit_bias={5: 1.5}).biases([1, 2], 2) == {5: 1.5}


def test_no_end_before_the_minimum() -> None:
    at_least = rules(min_tokens=2, logit_bias={5: 1})
    assert at_least.biases([], 1) == {5: 1, 2: NEVER}
    assert at_least.biases([], 2) == {5: 1}
    assert not at_least.needs_tokens


def test_a_minimum_without_an_end_is_no_rule() -> None:
    assert not rules(min_tokens=2, end_ids=frozenset()).has_biases


def test_the_last_token_of_a_bad_word_is_forbidden_once_the_others_are_there() -> None:
    bad = rules(bad_words=[[4], [5, 6], [7, 5, 8]])
    assert bad.needs_tokens
    assert bad.biases([], 0) == {4: NEVER}
    assert bad.biases([7], 1) == {4: NEVER}
    assert bad.biases([7, 5], 2) == {4: NEVER, 6: NEVER, 8: NEVER}
    assert bad.biases([5, 7], 2) == {4: NEVER}


def test_a_bad_word_outweighs_a_bias() -> None:
    assert rules(bad_words=[[4]], logit_bias={4: 100}).biases([], 0) == {4: NEVER}


def test_the_mask_has_a_bit_for_each_allowed_token() -> None:
    allowed = rules(allowed_token_ids=[0, 31, 32, 69]).allowed
    assert allowed is not None
    assert allowed.dtype == np.uint32
    assert allowed.tolist() == [1 | 1 << 31, 1, 1 << 5]


def test_a_word_is_bad_with_and_without_a_space_before_it() -> None:
    ids = bad_word_ids([" ab", "c", "c"], lambda text: [ord(char) for char in text])
    assert ids == [[97, 98], [32, 97, 98], [99], [32, 99]]

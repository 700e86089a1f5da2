"""Sampling parameters are checked where they are made."""

import dataclasses
import math

import pytest

from tokenmill.errors import UsageError
from tokenmill.sampling.params import SamplingParams, sequence_seed


def test_the_defaults_sample_from_the_plain_distribution() -> None:
    params = SamplingParams()
    assert not params.is_greedy
    assert not params.has_penalties
    assert params.max_tokens == 16


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e300),
        ("temperature", "1"),
        ("temperature", None),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", -0.5),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", 2.5),
        ("top_k", 2**31),
        ("min_p", -0.1),
        ("min_p", 1.01),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", 2**64),
        ("seed", 1.5),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("stop", [""]),
        ("stop", 3),
        ("stop", ["a", 1]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", 7),
        ("n", 0),
        ("n", 1025),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("logit_bias", {1: 101}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {"1": 1}),
        ("logit_bias", [1]),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", "ab"),
        ("bad_words", [""]),
        ("bad_words", 3),
        ("truncate_prompt_tokens", -2),
        ("truncate_prompt_tokens", 0),
        ("include_stop_str_in_output", "yes"),
        ("ignore_eos", 1),
        ("skip_special_tokens", None),
    ],
)
def test_a_bad_value_is_refused_by_name_value_and_range(field: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field} is {value!r}, but must be ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0),
        ("top_p", 1),
        ("top_p", 1e-9),
        ("top_k", -1),
        ("min_p", 1),
        ("presence_penalty", -2),
        ("seed", -1),
        ("seed", 2**64 - 1),
        ("max_tokens", None),
    ],
)
def test_a_value_at_the_border_is_accepted(field: str, value: object) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value


def test_stops_become_tuples_and_the_params_are_frozen() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[1, 2])
    assert (params.stop, params.stop_token_ids) == (("END",), (1, 2))
    assert hash(params) == hash(SamplingParams(stop=["END"], stop_token_ids=(1, 2)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 0


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    assert SamplingParams(temperature=1e-30).is_greedy
    assert not SamplingParams(temperature=0.01).is_greedy


@pytest.mark.parametrize(
    "params",
    [{"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}],
)
def test_any_penalty_is_noticed(params: dict[str, float]) -> None:
    assert SamplingParams(**params).has_penalties


def test_seeds_differ_by_request_and_by_index_and_repeat_when_given() -> None:
    assert sequence_seed(7, 0) == sequence_seed(7, 0)
    seeds = {sequence_seed(seed, index) for seed in (-1, 0, 7) for index in range(3)}
    assert len(seeds) == 9
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert sequence_seed(None, 0) != sequence_seed(None, 0)


def test_an_empty_list_of_allowed_tokens_allows_nothing() -> None:
    with pytest.raises(UsageError, match=r"^allowed_token_ids is empty, but must "):
        SamplingParams(allowed_token_ids=[])


def test_what_is_given_comes_before_the_models_defaults_and_these_before_ours() -> None:
    config = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": None,
        "max_new_tokens": 99,
        "eos_token_id": 2,
    }
    params = SamplingParams.with_defaults(config, top_k=5, seed=1)
    assert params == SamplingParams(temperature=0.6, top_k=5, max_tokens=99, seed=1)


def test_a_models_bad_default_is_the_models_fault() -> None:
    with pytest.raises(UsageError, match=r"^the model's generation_config.json: temperature is -1"):
        SamplingParams.with_defaults({"temperature": -1}, temperature=0)
    with pytest.raises(UsageError, match=r"^temperature is -2"):
        SamplingParams.with_defaults({"temperature": 1}, temperature=-2)


def test_params_with_biases_can_be_hashed_and_replaced() -> None:
    params = SamplingParams(logit_bias={3: 1.0}, allowed_token_ids=[1, 2])
    assert hash(params) == hash(SamplingParams(logit_bias={3: 1}, allowed_token_ids=(1, 2)))
    assert dataclasses.replace(params, n=2).logit_bias == {3: 1.0}


def test_a_value_without_end_is_shown_in_part() -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(stop_token_ids=["a"] * 10_000)
    assert len(str(caught.value)) < 200

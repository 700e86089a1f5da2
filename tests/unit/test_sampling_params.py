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

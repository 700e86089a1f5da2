import numpy as np
import pytest

from tokenmill.errors import UsageError
from tokenmill.loadgen.metrics import (
    MetricOptions,
    concurrency_steps,
    details,
    failures,
    percentile,
    summarize,
    tokens_per_second,
)
from tokenmill.loadgen.records import RequestRecord

RECORDS = [
    RequestRecord(
        started_s=0.0,
        ended_s=2.0,
        prompt_len=10,
        output_len=4,
        token_times_s=[0.5, 1.0, 1.2, 2.0],
    ),
    RequestRecord(started_s=1.0, ended_s=1.25, prompt_len=20, output_len=1, token_times_s=[1.25]),
    RequestRecord(started_s=1.0, ended_s=5.0, prompt_len=99, output_len=3, error="HTTP 429"),
]


def test_fields_are_those_of_vllm():
    result = summarize(RECORDS, 4.0, MetricOptions(percentiles=(50, 99.9)))
    assert {key: result[key] for key in list(result)[:11]} == {
        "duration": 4.0,
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 30,
        "total_output_tokens": 5,
        "request_throughput": 0.5,
        "request_goodput": None,
        "output_throughput": 1.25,
        "total_token_throughput": 8.75,
        "max_output_tokens_per_s": 3.0,
        "max_concurrent_requests": 3,
    }
    assert result["mean_ttft_ms"] == pytest.approx(375)
    assert result["median_tpot_ms"] == pytest.approx(500)  # of the one request with two tokens
    assert result["median_itl_ms"] == pytest.approx(500)
    assert result["p50_e2el_ms"] == pytest.approx(1125)
    assert set(result) >= {"std_itl_ms", "p99.9_ttft_ms"}


def test_only_the_metrics_asked_for():
    result = summarize(RECORDS, 4.0, MetricOptions(metrics=("ttft",)))
    assert "p99_ttft_ms" in result
    assert not any("itl" in key for key in result)


@pytest.mark.parametrize(
    ("limits", "rate"),
    [({"ttft": 600}, 0.5), ({"ttft": 300}, 0.25), ({"tpot": 1, "e2el": 300}, 0.25)],
)
def test_goodput_counts_requests_within_all_limits(limits, rate):
    assert summarize(RECORDS, 4.0, MetricOptions(goodput=limits))["request_goodput"] == rate


def test_nothing_but_failures():
    result = summarize(RECORDS[2:], 4.0, MetricOptions())
    assert (result["completed"], result["failed"], result["p99_itl_ms"]) == (0, 1, 0.0)
    assert failures(RECORDS) == {"HTTP 429": 1}
    assert details(RECORDS)["errors"] == ["", "", "HTTP 429"]


def test_percentiles_are_numpys():
    values = np.random.default_rng(0).random(37).tolist()
    for percent in (0, 12.5, 50, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_an_event_of_several_tokens_counts_as_such():
    record = RequestRecord(
        started_s=0, ended_s=2.5, prompt_len=1, output_len=6, token_times_s=[0.1, 2.5]
    )
    assert tokens_per_second([record]) == [3.0, 0.0, 3.0]


def test_a_request_that_follows_another_does_not_overlap_it():
    records = [
        RequestRecord(started_s=0, ended_s=1, prompt_len=1),
        RequestRecord(started_s=1, ended_s=2, prompt_len=1),
    ]
    assert max(count for _, count in concurrency_steps(records)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"metrics": ("speed",)},
        {"percentiles": (101,)},
        {"goodput": {"itl": 5}},
        {"goodput": {"ttft": 0}},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(UsageError, match="--"):
        MetricOptions(**options)

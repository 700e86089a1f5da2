"""Measured against simulated between two network namespaces: see benchmarks/."""

import os

import pytest

from benchmarks import collectives_two_hosts as two_hosts


@pytest.mark.slow
def test_measured_times_are_those_that_the_simulator_predicts():
    if "TOKENMILL_TEST_TWO_HOSTS" not in os.environ:
        pytest.skip("it measures, so nothing else may run: set TOKENMILL_TEST_TWO_HOSTS=1")
    reason = two_hosts.why_not()
    if reason:
        pytest.skip(reason)
    rows = {(row["plan"], row["num_bytes"]): row for row in two_hosts.run()}
    measured = {key: row["measured_s"] for key, row in rows.items()}
    small, large = min(two_hosts.SIZES), max(two_hosts.SIZES)
    for size in (small, large):
        flat, hierarchical = measured["flat ring", size], measured["hierarchical", size]
        assert hierarchical < flat < measured["interleaved ring", size]
    assert measured["interleaved ring", large] > 1.5 * measured["flat ring", large]
    for key, row in rows.items():
        ratio = row["measured_s"] / row["simulated_s"]
        assert 1 - two_hosts.LIMIT < ratio < 1 + two_hosts.LIMIT, (key, ratio)

import math
import statistics
from itertools import pairwise

import pytest

from tokenmill.errors import UsageError
from tokenmill.loadgen.arrivals import check_arrivals, draw_arrivals, schedule
from tokenmill.loadgen.records import LoadRequest


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 16.0])
def test_rate_and_burstiness(burstiness):
    times = draw_arrivals(20_000, rate=50.0, burstiness=burstiness, seed=0)
    intervals = [after - before for before, after in pairwise(times)]
    assert times[0] == 0
    assert statistics.fmean(intervals) == pytest.approx(1 / 50, rel=0.05)
    variation = statistics.pstdev(intervals) / statistics.fmean(intervals)
    assert variation == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def request(arrival_s=None):
    return LoadRequest(prompt=[1], prompt_len=1, output_len=1, arrival_s=arrival_s)


def times(requests, rate=None, speed=1.0):
    return [t for t, _ in schedule(requests, rate=rate, burstiness=1, seed=0, speed=speed)]


def test_a_trace_keeps_its_arrivals_unless_there_is_a_rate():
    trace = [request(4.0), request(1.0)]
    assert times(trace) == [1.0, 4.0]
    assert times(trace, speed=2.0) == [0.5, 2.0]
    assert times(trace, rate=math.inf) == [0.0, 0.0]
    assert times([request(), request()]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("rate", "burstiness"), [(0, 1), (-1, 1), (math.nan, 1), (1, 0), (1, math.inf)]
)
def test_what_cannot_be_drawn_is_refused(rate, burstiness):
    with pytest.raises(UsageError, match="must be above 0"):
        check_arrivals(rate, burstiness)

"""When requests are sent."""

import math
import random
from collections.abc import Iterator, Sequence

from tokenmill.errors import UsageError
from tokenmill.loadgen.records import LoadRequest


def check_arrivals(rate: float, burstiness: float) -> None:
    """Raises UsageError where no arrivals could be drawn."""
    if not rate > 0:
        raise UsageError(f"--request-rate is {rate:g}, but must be above 0, or inf")
    if not 0 < burstiness < math.inf:
        raise UsageError(f"--burstiness is {burstiness:g}, but must be above 0")


def draw_arrivals(count: int, *, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start to each of `count` requests, `rate` of them a second.

    Intervals follow a gamma distribution with shape `burstiness`: 1 is a Poisson process, less is
    more bursty, more is more even. An infinite rate sends all at once.
    """
    if math.isinf(rate):
        return [0.0] * count
    rng = random.Random(seed)
    return list(_sums(rng.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count)))


def schedule(
    requests: Sequence[LoadRequest],
    *,
    rate: float | None,
    burstiness: float,
    seed: int,
    speed: float = 1.0,
) -> list[tuple[float, LoadRequest]]:
    """Requests with their times, in order. A trace's own arrivals, `speed` times as fast, hold
    where `rate` is None."""
    if rate is None and all(request.arrival_s is not None for request in requests):
        timed = [((request.arrival_s or 0.0) / speed, request) for request in requests]
        return sorted(timed, key=lambda pair: pair[0])
    rate = math.inf if rate is None else rate
    times = draw_arrivals(len(requests), rate=rate, burstiness=burstiness, seed=seed)
    return list(zip(times, requests, strict=True))


def _sums(intervals: Iterator[float]) -> Iterator[float]:
    now_s = 0.0
    for interval in intervals:
        yield now_s
        now_s += interval

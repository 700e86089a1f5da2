"""From records to the fields that `vllm bench serve` writes, by its definitions.

TTFT: sent to first output. TPOT: mean time of an output token after the first, of requests with
two or more. ITL: time between two events of a stream. E2EL: sent to last output. Failed requests
count as failed, and nowhere else.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tokenmill.errors import UsageError
from tokenmill.loadgen.records import RequestRecord

METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}
_SLO_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, kw_only=True)
class MetricOptions:
    """`metrics` are those whose statistics are wanted; `goodput` maps a metric to its limit, ms."""

    metrics: tuple[str, ...] = ("ttft", "tpot", "itl", "e2el")
    percentiles: tuple[float, ...] = (99.0,)
    goodput: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                raise UsageError(
                    f"--percentile-metrics has {name!r}, but knows {', '.join(METRICS)}"
                )
        for percentile in self.percentiles:
            if not 0 <= percentile <= 100:
                raise UsageError(f"--metric-percentiles has {percentile:g}, outside 0 to 100")
        for name, limit_ms in self.goodput.items():
            if name not in _SLO_METRICS or not limit_ms > 0:
                raise UsageError(
                    f"--goodput has {name}:{limit_ms:g}, but takes ttft, tpot and e2el, each with "
                    "a limit in ms above 0"
                )


def latencies_ms(records: Sequence[RequestRecord]) -> dict[str, list[float]]:
    """The values of each metric over the requests that completed."""
    done = [record for record in records if record.error is None]
    return {
        "ttft": [record.ttft_s * 1e3 for record in done],
        "tpot": [record.tpot_s * 1e3 for record in done if record.output_len > 1],
        "itl": [itl_s * 1e3 for record in done for itl_s in record.itls_s],
        "e2el": [record.e2el_s * 1e3 for record in done],
    }


def summarize(
    records: Sequence[RequestRecord], duration_s: float, options: MetricOptions
) -> dict[str, object]:
    """The result: counts, rates per second, and mean, median, std and percentiles in ms."""
    done = [record for record in records if record.error is None]
    num_input = sum(record.prompt_len for record in done)
    num_output = sum(record.output_len for record in done)
    good = [record for record in done if _is_good(record, options.goodput)]
    result: dict[str, object] = {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / duration_s,
        "request_goodput": len(good) / duration_s if options.goodput else None,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "max_output_tokens_per_s": max(tokens_per_second(records), default=0.0),
        "max_concurrent_requests": max_concurrent(records),
    }
    values = latencies_ms(records)
    for name in options.metrics:
        result |= _statistics(name, values[name], options.percentiles)
    return result


def details(records: Sequence[RequestRecord]) -> dict[str, object]:
    """One entry a request, in seconds."""
    return {
        "input_lens": [record.prompt_len for record in records],
        "output_lens": [record.output_len for record in records],
        "start_times": [record.started_s for record in records],
        "ttfts": [record.ttft_s for record in records],
        "itls": [record.itls_s for record in records],
        "generated_texts": [record.text for record in records],
        "errors": [record.error or "" for record in records],
    }


def failures(records: Sequence[RequestRecord]) -> Counter[str]:
    """How many requests failed for each reason."""
    return Counter(record.error for record in records if record.error is not None)


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the two nearest of the sorted values; 0 if there is none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def tokens_per_second(records: Sequence[RequestRecord]) -> list[float]:
    """Output tokens in each second of the run; an event of several tokens counts as such."""
    seconds: dict[int, float] = {}
    for record in records:
        if record.error is not None or not record.token_times_s:
            continue
        weight = record.output_len / len(record.token_times_s)
        for at_s in record.token_times_s:
            seconds[int(at_s)] = seconds.get(int(at_s), 0.0) + weight
    return [seconds.get(second, 0.0) for second in range(max(seconds, default=-1) + 1)]


def concurrency_steps(records: Sequence[RequestRecord]) -> list[tuple[float, int]]:
    """(time, requests under way from then on), in order of time; ends come before starts."""
    changes = [(record.started_s, 1) for record in records]
    changes += [(record.ended_s, -1) for record in records]
    steps, count = [], 0
    for at_s, change in sorted(changes):
        count += change
        steps.append((at_s, count))
    return steps


def max_concurrent(records: Sequence[RequestRecord]) -> int:
    return max((count for _, count in concurrency_steps(records)), default=0)


def percentile_name(percent: float) -> str:
    """`p99`, `p99.9`."""
    return f"p{percent:g}"


def _statistics(
    name: str, values: Sequence[float], percentiles: Sequence[float]
) -> dict[str, object]:
    result: dict[str, object] = {
        f"mean_{name}_ms": statistics.fmean(values) if values else 0.0,
        f"median_{name}_ms": statistics.median(values) if values else 0.0,
        f"std_{name}_ms": statistics.pstdev(values) if values else 0.0,
    }
    for percent in percentiles:
        result[f"{percentile_name(percent)}_{name}_ms"] = percentile(values, percent)
    return result


def _is_good(record: RequestRecord, goodput: Mapping[str, float]) -> bool:
    seconds = {"ttft": record.ttft_s, "tpot": record.tpot_s, "e2el": record.e2el_s}
    return all(seconds[name] * 1e3 <= limit_ms for name, limit_ms in goodput.items())

"""Measure an engine in this process: all prompts at once, or one batch over and over."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tokenmill.loadgen.metrics import percentile
from tokenmill.loadgen.records import LoadRequest
from tokenmill.sampling.params import SamplingParams

if TYPE_CHECKING:
    from tokenmill.engine.llm import LLM

LATENCY_PERCENTILES = (10, 25, 50, 75, 90, 99)
OnDone = Callable[[int, int], None]
"""Takes how many are done, and of how many."""


def measure_throughput(
    llm: "LLM", requests: Sequence[LoadRequest], *, ignore_eos: bool, on_done: OnDone | None = None
) -> dict[str, object]:
    """Complete all prompts at once. The fields are those of `vllm bench throughput`, and
    `output_tokens_per_second`."""
    params = [_params(request.output_len, ignore_eos) for request in requests]
    started_s = time.perf_counter()
    outputs = llm.generate([request.prompt for request in requests], params, progress=on_done)
    elapsed_s = time.perf_counter() - started_s
    num_output = sum(output.num_output_tokens for output in outputs)
    total = num_output + sum(output.num_prompt_tokens for output in outputs)
    return {
        "elapsed_time": elapsed_s,
        "num_requests": len(requests),
        "total_num_tokens": total,
        "requests_per_second": len(requests) / elapsed_s,
        "tokens_per_second": total / elapsed_s,
        "output_tokens_per_second": num_output / elapsed_s,
    }


def measure_latency(
    llm: "LLM",
    prompts: Sequence[str | list[int]],
    *,
    output_len: int,
    num_warmups: int,
    num_runs: int,
    on_done: OnDone | None = None,
) -> dict[str, object]:
    """Complete one batch again and again. The fields are those of `vllm bench latency`, in
    seconds."""
    params = _params(output_len, ignore_eos=True)
    seconds = []
    for index in range(num_warmups + num_runs):
        started_s = time.perf_counter()
        llm.generate(list(prompts), params)
        seconds.append(time.perf_counter() - started_s)
        if on_done:
            on_done(index + 1, num_warmups + num_runs)
    measured = seconds[num_warmups:]
    return {
        "avg_latency": statistics.fmean(measured),
        "latencies": measured,
        "percentiles": {str(p): percentile(measured, p) for p in LATENCY_PERCENTILES},
    }


def _params(output_len: int, ignore_eos: bool) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=ignore_eos)

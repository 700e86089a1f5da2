"""Prometheus metrics: the names and buckets of vLLM, with our prefix."""

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from tokenmill.backends.base import BLOCK_SIZE
from tokenmill.engine.engine import Engine
from tokenmill.engine.outputs import OutputDelta, RequestOutput, Timings
from tokenmill.engine.request import Event, Request
from tokenmill.engine.stats import EngineStats

CONTENT_TYPE = CONTENT_TYPE_LATEST
_LABELS = ("model_name",)

_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(step * 10**power) for power in range(5) for step in (1, 2, 5))
_SAMPLES = (1.0, 2.0, 5.0, 10.0, 20.0)
_REQUEST_HISTOGRAMS = {
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens generated for a request.", _TOKENS),
    "request_params_max_tokens": ("Tokens that a request allows a sample.", _TOKENS),
    "request_params_n": ("Samples that a request asks for.", _SAMPLES),
    "request_time_per_output_token_seconds": ("Decode time by token.", _INTER_TOKEN_S),
    "request_inference_time_seconds": ("Time from first step to last token.", _REQUEST_S),
    "time_to_first_token_seconds": ("Time to first token.", _FIRST_TOKEN_S),
    "e2e_request_latency_seconds": ("Time from arrival to the end.", _REQUEST_S),
    "request_queue_time_seconds": ("Time waited for the first step.", _REQUEST_S),
    "request_prefill_time_seconds": ("Time from first step to first token.", _REQUEST_S),
    "request_decode_time_seconds": ("Time from first to last token.", _REQUEST_S),
}
_GAUGES = {
    "num_requests_running": ("Sequences that run.", "num_running"),
    "num_requests_waiting": ("Sequences that wait.", "num_waiting"),
    "kv_cache_usage_perc": ("Part of the KV cache in use; 1 is all of it.", "kv_cache_usage"),
}
_COUNTERS = {
    "prefix_cache_queries": ("Prompt tokens looked for in the cache.", "prefix_cache_queries"),
    "prefix_cache_hits": ("Prompt tokens found in the cache.", "prefix_cache_hits"),
    "num_preemptions": ("Sequences that had to start again.", "num_preemptions"),
    "num_evictions": ("Cached blocks given up for others.", "num_evictions"),
    "prompt_tokens": ("Prompt tokens taken.", "prompt_tokens"),
    "generation_tokens": ("Tokens generated.", "generation_tokens"),
    "spec_decode_num_draft_tokens": ("Tokens drafted.", "draft_tokens"),
    "spec_decode_num_accepted_tokens": ("Draft tokens accepted.", "accepted_tokens"),
}


class TokenGaps(Collector):
    """The time between tokens. It hears of each of them, so it does no more than count."""

    def __init__(self, model_name: str) -> None:
        self._label = [model_name]
        self._counts = [0] * (len(_INTER_TOKEN_S) + 1)
        self._total_s = 0.0

    def observe(self, seconds: float, num_tokens: int) -> None:
        """Tokens that came together share the time since those before."""
        self._counts[bisect_left(_INTER_TOKEN_S, seconds / num_tokens)] += num_tokens
        self._total_s += seconds

    def collect(self) -> Iterator[Metric]:
        yield _histogram(
            ("inter_token_latency_seconds", "Time between tokens."),
            self._label,
            (_INTER_TOKEN_S, self._counts, self._total_s),
        )


class Meters:
    """Counts what happens to requests; the engine's own counts are read when asked for."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        # They double the text, and no dashboard reads them.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._histograms = {
            name: self._histogram(name, text, buckets, model_name)
            for name, (text, buckets) in _REQUEST_HISTOGRAMS.items()
        }
        self._model_name = model_name
        self._success = Counter(
            "tokenmill:request_success",
            "Requests that ended, by reason.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(model_name, reason)
        self._last_token_s: dict[Request, dict[int, float]] = {}
        self._gaps = TokenGaps(model_name)
        self._registry.register(self._gaps)
        self._registry.register(EngineCollector(engine, model_name))
        ProcessCollector(registry=self._registry)  # memory, processor time, open files

    def observe(self, request: Request, delta: Event) -> None:
        """Note a delta, or the engine's end, as it arrives on the event loop."""
        if not isinstance(delta, OutputDelta):
            self._last_token_s.pop(request, None)
            self._success.labels(self._model_name, "error").inc(len(request.samples))
            return
        if request.is_streaming and delta.token_ids:
            self._note_tokens(request, delta)
        if delta.output is not None:
            self._last_token_s.pop(request, None)
            self._count(request, delta.output)
            if delta.output.pooled is not None:
                return self._note_times(delta.output.timings)
            self._finish(delta.output, is_streaming=request.is_streaming)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self._registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], model_name: str
    ) -> Histogram:
        made = Histogram(
            f"tokenmill:{name}", text, _LABELS, registry=self._registry, buckets=buckets
        )
        return made.labels(model_name)

    def _note_tokens(self, request: Request, delta: OutputDelta) -> None:
        now = time.perf_counter()
        if request not in self._last_token_s:
            self._note("time_to_first_token_seconds", request.first_token_s)
        lasts = self._last_token_s.setdefault(request, {})
        last = lasts.get(delta.index)
        lasts[delta.index] = now
        if last is not None:
            self._gaps.observe(now - last, len(delta.token_ids))

    def _count(self, request: Request, output: RequestOutput) -> None:
        for sample in output.outputs:
            self._success.labels(self._model_name, sample.finish_reason).inc()
        self._note("request_prompt_tokens", output.num_prompt_tokens)
        if output.pooled is not None:
            return  # nothing was generated, and no parameter of sampling given
        self._note("request_generation_tokens", output.num_output_tokens)
        self._note("request_params_max_tokens", request.params.max_tokens)
        self._note("request_params_n", request.params.n)

    def _finish(self, output: RequestOutput, *, is_streaming: bool) -> None:
        timings = output.timings
        self._note_times(timings)
        if not is_streaming:
            self._note("time_to_first_token_seconds", timings.first_token_s)
        if timings.first_token_s is None or timings.last_token_s is None:
            return
        decode_s = timings.last_token_s - timings.first_token_s
        self._note("request_decode_time_seconds", decode_s)
        if timings.queue_s is not None:
            self._note("request_prefill_time_seconds", timings.first_token_s - timings.queue_s)
            self._note("request_inference_time_seconds", timings.last_token_s - timings.queue_s)
        num_after_first = output.num_output_tokens - len(output.outputs)
        if num_after_first <= 0:
            return
        per_sample = num_after_first / len(output.outputs)
        self._note("request_time_per_output_token_seconds", decode_s / per_sample)
        if not is_streaming:
            self._gaps.observe(decode_s / per_sample * num_after_first, num_after_first)

    def _note_times(self, timings: Timings) -> None:
        self._note("e2e_request_latency_seconds", timings.total_s)
        self._note("request_queue_time_seconds", timings.queue_s)

    def _note(self, name: str, value: float | None) -> None:
        if value is not None:
            self._histograms[name].observe(value)


class EngineCollector(Collector):
    """What the engine counts by itself."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._label = [model_name]

    def describe(self) -> Iterable[Metric]:
        return []  # registration would collect to learn the names

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        yield self._config(stats)
        if stats.max_loras:
            yield self._adapters(stats)
        for name, (text, field) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"tokenmill:{name}", text, labels=_LABELS)
            gauge.add_metric(self._label, getattr(stats, field))
            yield gauge
        for name, (text, field) in _COUNTERS.items():
            counter = CounterMetricFamily(f"tokenmill:{name}", text, labels=_LABELS)
            counter.add_metric(self._label, getattr(stats, field))
            yield counter
        steps = stats.step_tokens
        yield _histogram(
            ("iteration_tokens_total", "Tokens in a step."),
            self._label,
            (steps.bounds, steps.counts, steps.total),
        )

    def _adapters(self, stats: EngineStats) -> Metric:
        """Which adapters are in use, as labels; the value is the time, as in vLLM."""
        labels = {
            "max_lora": str(stats.max_loras),
            "running_lora_adapters": ",".join(stats.running_loras),
            "waiting_lora_adapters": ",".join(stats.waiting_loras),
        }
        text = "The LoRA adapters of running and of waiting sequences."
        info = GaugeMetricFamily("tokenmill:lora_requests_info", text, labels=(*_LABELS, *labels))
        info.add_metric([*self._label, *labels.values()], time.time())
        return info

    def _config(self, stats: EngineStats) -> Metric:
        """What does not change, as labels of a gauge that is 1."""
        labels = {"block_size": str(BLOCK_SIZE), "num_blocks": str(stats.num_blocks)}
        text = "The KV cache as it was set up."
        info = GaugeMetricFamily("tokenmill:cache_config_info", text, labels=(*_LABELS, *labels))
        info.add_metric([*self._label, *labels.values()], 1)
        return info


def _histogram(
    head: tuple[str, str], label: list[str], counted: tuple[Sequence[float], Sequence[int], float]
) -> Metric:
    """A histogram of (name, text) from (bounds, count by bucket, sum of all)."""
    bounds, counts, total = counted
    names = [*(f"{float(bound)}" for bound in bounds), "+Inf"]
    family = HistogramMetricFamily(f"tokenmill:{head[0]}", head[1], labels=_LABELS)
    family.add_metric(label, list(zip(names, accumulate(counts), strict=True)), total)
    return family

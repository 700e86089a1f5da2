"""`tokenmill bench`: load on a server, or on the engine in this process."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.cli import arguments, bench_arguments
from tokenmill.cli.bench_progress import BenchProgress
from tokenmill.cli.loading import open_llm
from tokenmill.errors import TokenmillError, UsageError

if TYPE_CHECKING:
    from tokenmill.engine.llm import LLM
    from tokenmill.loadgen.datasets import DatasetOptions
    from tokenmill.loadgen.records import LoadRequest, RequestRecord
    from tokenmill.loadgen.runner import Run
    from tokenmill.loadgen.target import Target

_WARM_UP_TOKENS = 16


def add_arguments(parser: ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, text, add in (
        ("serve", "requests to any OpenAI-compatible server", _add_serve_arguments),
        ("throughput", "many prompts at once, in this process", _add_throughput_arguments),
        ("latency", "one batch again and again, in this process", _add_latency_arguments),
    ):
        add(kinds.add_parser(name, help=text, description=text, allow_abbrev=False))


def bench(*, benchmark: str, **values: Any) -> None:
    """Run one benchmark: serve, throughput or latency."""
    {"serve": _serve, "throughput": _throughput, "latency": _latency}[benchmark](values)


def _add_serve_arguments(parser: ArgumentParser) -> None:
    bench_arguments.add_target_arguments(parser)
    bench_arguments.add_dataset_arguments(parser)
    bench_arguments.add_eos_argument(parser)
    bench_arguments.add_traffic_arguments(parser)
    bench_arguments.add_result_arguments(parser)


def _add_throughput_arguments(parser: ArgumentParser) -> None:
    bench_arguments.add_dataset_arguments(parser)
    bench_arguments.add_eos_argument(parser)
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write the result")
    arguments.add_engine_arguments(parser)
    arguments.add_scheduling_arguments(parser)


def _add_latency_arguments(parser: ArgumentParser) -> None:
    for flag, default, text in (
        ("--input-len", 32, "tokens of each prompt"),
        ("--output-len", 128, "tokens of each answer"),
        ("--batch-size", 8, "prompts at a time"),
        ("--num-iters-warmup", 3, "batches before, which do not count"),
        ("--num-iters", 10, "batches that count"),
        ("--seed", 0, "of the prompts"),
    ):
        parser.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write the result")
    arguments.add_engine_arguments(parser)
    arguments.add_scheduling_arguments(parser)


def _serve(values: dict[str, Any]) -> None:
    import asyncio

    from tokenmill.loadgen import report
    from tokenmill.loadgen.arrivals import check_arrivals, schedule
    from tokenmill.loadgen.metrics import details, summarize
    from tokenmill.loadgen.target import Target

    dataset = bench_arguments.make_dataset_options(values)
    metrics = bench_arguments.make_metric_options(values)
    ignore_eos = _ignores_eos(values, dataset)
    options = bench_arguments.make_target_options(values, ignore_eos=ignore_eos)
    rate = values["request_rate"]
    check_arrivals(1.0 if rate is None else rate, values["burstiness"])
    speed = _trace_speed(values)
    metadata = bench_arguments.make_metadata(values)
    bench_arguments.make_result_path(values, "")  # what is wrong with it is said before the run
    target = Target(options)
    requests, warm_ups = _load_requests(target, dataset, values)
    timed = schedule(
        requests,
        rate=rate,
        burstiness=values["burstiness"],
        seed=dataset.seed,
        speed=speed,
    )
    run = asyncio.run(_run(target, timed, warm_ups, values["max_concurrency"]))
    result = summarize(run.records, run.duration_s, metrics)
    report.print_report(result, run, metrics)
    settings = _settings(values, target, len(requests))
    document = {**metadata, **settings, **result}
    if values["save_detailed"]:
        document |= details(run.records)
    _save(values, document, run, target.model)
    if not result["completed"]:
        raise TokenmillError(f"all {len(run.records)} requests failed, for the reasons above")


def _trace_speed(values: dict[str, Any]) -> float:
    speed: float | None = values["trace_speed"]
    if speed is None:
        return 1.0
    if values["request_rate"] is not None:
        raise UsageError("--trace-speed plays a trace's arrivals, which --request-rate replaces")
    if not speed > 0:
        raise UsageError(f"--trace-speed is {speed:g}, but must be above 0")
    return speed


def _ignores_eos(values: dict[str, Any], dataset: "DatasetOptions") -> bool:
    """Lengths are only those asked for where answers do not end by themselves."""
    chosen: bool | None = values["ignore_eos"]
    return dataset.name != "sharegpt" if chosen is None else chosen


def _load_requests(
    target: "Target", dataset: "DatasetOptions", values: dict[str, Any]
) -> "tuple[list[LoadRequest], list[LoadRequest]]":
    """The requests of the run, and those that warm the server up, which have prompts of their
    own."""
    from tokenmill.loadgen.datasets import DatasetOptions, load_dataset
    from tokenmill.loadgen.target import CHAT
    from tokenmill.loadgen.vocabulary import ID_VOCABULARY, open_tokenizer, word_vocabulary

    name = values["tokenizer"]
    if name is None and target.options.endpoint == CHAT:
        raise UsageError(f"{CHAT} takes text: name a --tokenizer to make it with")
    tokenizer = None if name is None else open_tokenizer(name)
    vocabulary = ID_VOCABULARY if tokenizer is None else word_vocabulary(tokenizer)
    requests = load_dataset(dataset, vocabulary, tokenizer)
    count = values["num_warmups"]
    if count < 0:
        raise UsageError(f"--num-warmups is {count}, but must be at least 0")
    if count == 0:
        return requests, []
    warm = DatasetOptions(
        num_prompts=count,
        seed=-1 - dataset.seed,  # prompts that no run has
        input_len=min(requests[0].prompt_len, dataset.input_len),
        output_len=_WARM_UP_TOKENS,
    )
    return requests, load_dataset(warm, vocabulary, tokenizer)


async def _run(
    target: "Target",
    timed: "Sequence[tuple[float, LoadRequest]]",
    warm_ups: "Sequence[LoadRequest]",
    max_concurrency: int | None,
) -> "Run":
    from tokenmill.loadgen.report import count_line
    from tokenmill.loadgen.runner import run_load, warm_up

    progress = BenchProgress()
    records: list[RequestRecord] = []

    def add(record: "RequestRecord") -> None:
        records.append(record)
        progress.show(lambda elapsed_s: count_line(records, len(timed), elapsed_s))

    with target:
        await target.find_model()
        await warm_up(target, warm_ups)
        run = await run_load(target, timed, max_concurrency=max_concurrency, on_record=add)
    progress.close()
    return run


def _settings(values: dict[str, Any], target: "Target", num_prompts: int) -> dict[str, object]:
    """What was measured and how, beside the result."""
    rate = values["request_rate"]
    backend = "openai-chat" if "chat" in target.options.endpoint else values["backend"]
    return {
        "date": f"{datetime.now():%Y%m%d-%H%M%S}",
        "endpoint_type": backend,
        "backend": backend,
        "label": None,
        "model_id": target.model,
        "tokenizer_id": values["tokenizer"],
        "num_prompts": num_prompts,
        "request_rate": "inf" if rate is None or rate == float("inf") else rate,
        "burstiness": values["burstiness"],
        "max_concurrency": values["max_concurrency"],
    }


def _save(values: dict[str, Any], document: dict[str, object], run: "Run", model: str) -> None:
    from tokenmill.loadgen import report
    from tokenmill.loadgen.plot import draw_run

    base = model.rpartition("/")[2]
    name = f"{document['backend']}-{document['request_rate']}qps-{base}-{document['date']}.json"
    path = bench_arguments.make_result_path(values, name)
    if path is not None:
        report.save_json(path, document)
        print(f"saved {path}", file=sys.stderr)
    if values["plot"] is not None:
        rate = document["output_throughput"]
        title = f"{model}: {len(run.records)} requests, {rate:,.0f} output tokens per second"
        report.save_text(values["plot"], draw_run(run.records, title))
        print(f"saved {values['plot']}", file=sys.stderr)


def _throughput(values: dict[str, Any]) -> None:
    from tokenmill.loadgen.datasets import load_dataset
    from tokenmill.loadgen.offline import measure_throughput
    from tokenmill.loadgen.vocabulary import word_vocabulary

    dataset = bench_arguments.make_dataset_options(values)
    ignore_eos = _ignores_eos(values, dataset)
    with open_llm(arguments.make_engine_config(values)) as llm:
        tokenizer = llm.loaded.tokenizer
        requests = load_dataset(dataset, word_vocabulary(tokenizer), tokenizer)
        _warm_up(llm)
        progress = BenchProgress()
        result = measure_throughput(
            llm, requests, ignore_eos=ignore_eos, on_done=progress.count("prompts")
        )
        progress.close()
    print(
        f"Throughput: {result['requests_per_second']:.2f} requests/s, "
        f"{result['tokens_per_second']:.2f} total tokens/s, "
        f"{result['output_tokens_per_second']:.2f} output tokens/s"
    )
    _save_json(values["output_json"], result)


def _latency(values: dict[str, Any]) -> None:
    from tokenmill.loadgen.datasets import DatasetOptions, load_dataset
    from tokenmill.loadgen.offline import measure_latency
    from tokenmill.loadgen.vocabulary import word_vocabulary

    for flag, least in (("num_iters", 1), ("num_iters_warmup", 0), ("batch_size", 1)):
        if values[flag] < least:
            name = flag.replace("_", "-")
            raise UsageError(f"--{name} is {values[flag]}, but must be at least {least}")
    dataset = DatasetOptions(
        num_prompts=values["batch_size"],
        seed=values["seed"],
        input_len=values["input_len"],
        output_len=values["output_len"],
    )
    with open_llm(arguments.make_engine_config(values)) as llm:
        requests = load_dataset(dataset, word_vocabulary(llm.loaded.tokenizer), None)
        progress = BenchProgress()
        result = measure_latency(
            llm,
            [request.prompt for request in requests],
            output_len=values["output_len"],
            num_warmups=values["num_iters_warmup"],
            num_runs=values["num_iters"],
            on_done=progress.count("batches"),
        )
        progress.close()
    print(f"Avg latency: {result['avg_latency']:.4f} seconds")
    percentiles = result["percentiles"]
    assert isinstance(percentiles, dict)
    for percent, seconds in percentiles.items():
        print(f"{percent}% percentile latency: {seconds:.4f} seconds")
    _save_json(values["output_json"], result)


def _warm_up(llm: "LLM") -> None:
    """Compile, fault pages in, fill caches."""
    from tokenmill.sampling.params import SamplingParams

    llm.generate(["warm up"], SamplingParams(max_tokens=_WARM_UP_TOKENS, ignore_eos=True))


def _save_json(path: Path | None, document: dict[str, object]) -> None:
    from tokenmill.loadgen.report import save_json

    if path is not None:
        save_json(path, document)
        print(f"saved {path}", file=sys.stderr)

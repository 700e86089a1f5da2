"""The flags of `tokenmill bench`, named as those of `vllm bench`, and what is made of them."""

import json
from argparse import ArgumentParser, BooleanOptionalAction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.errors import UsageError

if TYPE_CHECKING:
    from tokenmill.loadgen.datasets import DatasetOptions
    from tokenmill.loadgen.metrics import MetricOptions
    from tokenmill.loadgen.target import TargetOptions

KEY_VARIABLE = "OPENAI_API_KEY"
_ENDPOINTS = {
    # backend: endpoint
    "openai": "/v1/completions",
    "vllm": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}


def add_dataset_arguments(parser: ArgumentParser) -> None:
    """What `make_dataset_options` takes."""
    group = parser.add_argument_group("what is sent")
    group.add_argument(
        "--dataset-name",
        default="random",
        choices=("random", "sharegpt", "azure", "mooncake"),
        help="made-up prompts, conversations, or the lengths and arrivals of a trace "
        "(default: %(default)s)",
    )
    group.add_argument("--dataset-path", type=Path, metavar="FILE", help="its file")
    group.add_argument(
        "--num-prompts",
        type=int,
        metavar="N",
        help="requests (default: 1000; of a trace with --trace-seconds, all)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    for flag, default, text in (
        ("--random-input-len", 1024, "tokens of a random prompt"),
        ("--random-prefix-len", 0, "tokens before it that all prompts share"),
    ):
        group.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    group.add_argument(
        "--output-len",
        "--random-output-len",
        "--sharegpt-output-len",
        type=int,
        metavar="N",
        help="tokens to ask for (default: 128 if random, else what the dataset says)",
    )
    group.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="lengths spread evenly from 1-R to 1+R times (default: 0)",
    )
    group.add_argument(
        "--length-divisor",
        type=int,
        default=1,
        metavar="N",
        help="divide the lengths of a trace, for a small model (default: 1)",
    )
    group.add_argument(
        "--trace-seconds", type=float, metavar="S", help="only so much of a trace's beginning"
    )


def make_dataset_options(values: dict[str, Any]) -> "DatasetOptions":
    """The dataset in the parsed values; UsageError where they make no sense."""
    from tokenmill.loadgen.datasets import DEFAULT_PROMPTS, DatasetOptions

    num_prompts = values["num_prompts"]
    if num_prompts is None and values["trace_seconds"] is None:
        num_prompts = DEFAULT_PROMPTS
    return DatasetOptions(
        name=values["dataset_name"],
        path=values["dataset_path"],
        num_prompts=num_prompts,
        seed=values["seed"],
        input_len=values["random_input_len"],
        output_len=values["output_len"],
        range_ratio=values["random_range_ratio"],
        prefix_len=values["random_prefix_len"],
        length_divisor=values["length_divisor"],
        trace_seconds=values["trace_seconds"],
    )


def add_eos_argument(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--ignore-eos",
        action=BooleanOptionalAction,
        default=None,
        help="go on to the length asked for (default: yes, but no for sharegpt)",
    )


def add_target_arguments(parser: ArgumentParser) -> None:
    """What `make_target_options` takes."""
    group = parser.add_argument_group("the server")
    group.add_argument("--base-url", metavar="URL", help="instead of --host and --port")
    group.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--backend",
        default="openai",
        choices=tuple(_ENDPOINTS),
        help="vllm bench's name for the endpoint (default: %(default)s)",
    )
    group.add_argument(
        "--endpoint",
        choices=tuple(dict.fromkeys(_ENDPOINTS.values())),
        help="default: that of the backend",
    )
    group.add_argument("--model", metavar="NAME", help="default: the first that the server lists")
    group.add_argument("--api-key", metavar="KEY", help=f"default: the variable {KEY_VARIABLE}")
    group.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="make prompts of words with the tokenizer of this model (alias, folder or .gguf "
        "file); without it, of token ids",
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="default: %(default)s"
    )
    group.add_argument(
        "--extra-body", metavar="JSON", help="fields to add to every request, as an object"
    )
    group.add_argument(
        "--request-timeout", type=float, default=3600.0, metavar="S", help="default: %(default)g"
    )


def make_target_options(values: dict[str, Any], *, ignore_eos: bool) -> "TargetOptions":
    """The server in the parsed values; UsageError where they make no sense."""
    import os

    from tokenmill.loadgen.target import TargetOptions

    return TargetOptions(
        base_url=values["base_url"] or f"http://{_in_url(values['host'])}:{values['port']}",
        endpoint=values["endpoint"] or _ENDPOINTS[values["backend"]],
        model=values["model"],
        api_key=values["api_key"] or os.environ.get(KEY_VARIABLE) or None,
        temperature=values["temperature"],
        ignore_eos=ignore_eos,
        extra_body=_read_object("--extra-body", values["extra_body"]),
        timeout_s=values["request_timeout"],
    )


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def add_traffic_arguments(parser: ArgumentParser) -> None:
    """When requests are sent."""
    group = parser.add_argument_group("when")
    group.add_argument(
        "--request-rate",
        type=float,
        metavar="R",
        help="requests a second on average, which replace a trace's arrivals (default: those of "
        "the trace, else all at once)",
    )
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="X",
        help="1: a Poisson process, less: more bursty, more: more even (default: 1)",
    )
    group.add_argument(
        "--trace-speed",
        type=float,
        metavar="X",
        help="play the arrivals of a trace so many times as fast (default: 1)",
    )
    group.add_argument(
        "--max-concurrency", type=int, metavar="N", help="requests under way at a time, at most"
    )
    group.add_argument(
        "--num-warmups",
        type=int,
        default=1,
        metavar="N",
        help="requests before, which do not count (default: 1)",
    )


def add_result_arguments(parser: ArgumentParser) -> None:
    """What is reported, and where it is written."""
    group = parser.add_argument_group("result")
    group.add_argument(
        "--percentile-metrics",
        default="ttft,tpot,itl,e2el",
        metavar="LIST",
        help="of ttft, tpot, itl, e2el (default: all)",
    )
    group.add_argument(
        "--metric-percentiles", default="99", metavar="LIST", help="default: %(default)s"
    )
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="METRIC:MS",
        help="count the requests within limits, as in ttft:500 tpot:50 e2el:9000",
    )
    group.add_argument(
        "--save-result",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="FILE",
        help="write the result as JSON (default name: from the rate, the model and the date)",
    )
    group.add_argument("--result-dir", type=Path, metavar="DIR", help="folder of the result")
    group.add_argument("--result-filename", type=Path, metavar="FILE", help="its name there")
    group.add_argument(
        "--metadata",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="put these beside the result, to tell runs apart",
    )
    group.add_argument(
        "--save-detailed", action="store_true", help="with an entry for each request"
    )
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw the run, as SVG")


def make_metric_options(values: dict[str, Any]) -> "MetricOptions":
    """The metrics in the parsed values; UsageError where they make no sense."""
    from tokenmill.loadgen.metrics import MetricOptions

    percentiles = values["metric_percentiles"].split(",")
    return MetricOptions(
        metrics=tuple(name for name in values["percentile_metrics"].split(",") if name),
        percentiles=tuple(_number("--metric-percentiles", word) for word in percentiles),
        goodput=dict(_limit(word) for word in values["goodput"]),
    )


def make_metadata(values: dict[str, Any]) -> dict[str, str]:
    """The pairs of --metadata; UsageError for a word that is none."""
    pairs = [word.partition("=") for word in values["metadata"]]
    for name, separator, _ in pairs:
        if not (name and separator):
            raise UsageError(f"--metadata has {name!r}, but must be like version=1.2")
    return {name: value for name, _, value in pairs}


def make_result_path(values: dict[str, Any], default_name: str) -> Path | None:
    """Where the result is written; None: nowhere."""
    given: Path | None = values["save_result"]
    name: Path | None = values["result_filename"]
    if given is not None and given != Path() and name is not None:
        raise UsageError("--save-result and --result-filename both name the file: give one")
    if given is None and name is None and values["result_dir"] is None:
        return None
    if given in (None, Path()):
        given = name or Path(default_name)
    assert given is not None
    return (values["result_dir"] or Path()) / given


def _limit(word: str) -> tuple[str, float]:
    name, separator, limit = word.partition(":")
    if not separator:
        raise UsageError(f"--goodput has {word!r}, but must be like ttft:500 tpot:50")
    return name, _number("--goodput", limit)


def _number(flag: str, word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise UsageError(f"{flag} has {word!r}, which is no number") from None


def _read_object(flag: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{flag} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{flag} is {text!r}, but must be a JSON object")
    return value

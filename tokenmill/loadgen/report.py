"""What a run is summed up to on the terminal, and in a file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenmill.loadgen.metrics import METRICS, MetricOptions, failures, percentile_name
from tokenmill.loadgen.records import RequestRecord
from tokenmill.loadgen.runner import Run
from tokenmill.models.home import make_dir, write_atomically

BUSY_CLIENT = 0.5
"""Share of a core above which the client may be what is measured."""
LATE_S = 0.05
_COUNTS = (
    ("Successful requests", "completed", "d"),
    ("Failed requests", "failed", "d"),
    ("Duration, s", "duration", ".2f"),
    ("Input tokens", "total_input_tokens", ",d"),
    ("Output tokens", "total_output_tokens", ",d"),
    ("Requests/s", "request_throughput", ".2f"),
    ("Requests/s within the limits", "request_goodput", ".2f"),
    ("Output tokens/s", "output_throughput", ",.2f"),
    ("Output tokens/s, best second", "max_output_tokens_per_s", ",.2f"),
    ("Input and output tokens/s", "total_token_throughput", ",.2f"),
    ("Most requests at a time", "max_concurrent_requests", "d"),
)


def print_report(result: Mapping[str, Any], run: Run, options: MetricOptions) -> None:
    """Print counts, latencies, and the reasons of failures, to standard output."""
    print("Serving benchmark", *_columns(_counts(result)), sep="\n")
    if result["completed"] and options.metrics:
        print("\nLatency", *_columns(_latencies(result, options)), sep="\n")
    print()
    print("\n".join(remarks(run)))


def remarks(run: Run) -> list[str]:
    """What a reader should know: why requests failed, and whether the client was too slow."""
    lines = [f"failed {count} x {reason}" for reason, count in failures(run.records).most_common()]
    lines.append(f"the client used {run.client_load:.1%} of a core")
    if run.client_load > BUSY_CLIENT:
        lines[-1] += ": it may be what limits the figures"
    if run.max_delay_s > LATE_S:
        lines.append(f"requests were sent up to {run.max_delay_s * 1e3:.0f} ms late")
    return lines


def save_json(path: Path, document: Mapping[str, object]) -> None:
    """Write a result; raises UsageError or CapacityError where it cannot be."""
    save_text(path, json.dumps(document, ensure_ascii=False) + "\n")


def save_text(path: Path, text: str) -> None:
    write_atomically(make_dir(path.absolute().parent) / path.name, text.encode())


def _counts(result: Mapping[str, Any]) -> list[list[str]]:
    known = [(name, result[key], form) for name, key, form in _COUNTS]
    return [[name, format(value, form)] for name, value, form in known if value is not None]


def _latencies(result: Mapping[str, Any], options: MetricOptions) -> list[list[str]]:
    names = ["mean", "median", "std", *map(percentile_name, options.percentiles)]
    rows = [["ms", *names]]
    for metric in options.metrics:
        cells = [format(result[f"{name}_{metric}_ms"], ",.2f") for name in names]
        rows.append([f"{METRICS[metric]} ({metric.upper()})", *cells])
    return rows


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns as wide as they need be: the first to the left, the others right."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([f"  {row[0]:{first}}", *map(str.rjust, row[1:], others)]) for row in rows]


def count_line(records: Sequence[RequestRecord], total: int, elapsed_s: float) -> str:
    """`37/64 done, 1 failed, 1,432 output tokens/s`."""
    num_failed = sum(record.error is not None for record in records)
    num_tokens = sum(record.output_len for record in records)
    failed = f", {num_failed} failed" if num_failed else ""
    return f"{len(records)}/{total} done{failed}, {num_tokens / elapsed_s:,.0f} output tokens/s"

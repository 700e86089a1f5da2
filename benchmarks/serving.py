"""Our server under load, against llama.cpp's, and against the engine without a server.

    python benchmarks/serving.py --peer-python peer/bin/python [--peer-url http://127.0.0.1:8001]

Streaming clients ask for completions of random prompt ids, greedy, end of sequence ignored; every
run has new prompts, so that no prefix cache helps. The same load generator drives both sides, over
HTTP. llama.cpp has one slot a client over one unified KV cache with room for all. `--peer-url`
names another server that runs already, such as vLLM's.
"""

import asyncio
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from common import Figure, Peer, Series, compare, make_parser, model_path, open_peer, report

from tokenmill import LLM, SamplingParams
from tokenmill.loadgen.datasets import DatasetOptions, load_dataset
from tokenmill.loadgen.metrics import MetricOptions, failures, summarize
from tokenmill.loadgen.records import LoadRequest
from tokenmill.loadgen.runner import run_load
from tokenmill.loadgen.target import Target, TargetOptions
from tokenmill.loadgen.vocabulary import ID_VOCABULARY

STOP_TIMEOUT_S = 60
_METRICS = MetricOptions(percentiles=(50.0, 99.0))


def main() -> None:
    parser = make_parser(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--clients", type=int, default=16, help="at a time (default: 16)")
    parser.add_argument("--requests", type=int, default=64, help="default: 64")
    parser.add_argument("--many-clients", type=int, default=64, help="against the engine alone")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens (default: 128)")
    parser.add_argument("--output-len", type=int, default=128, help="new tokens (default: 128)")
    parser.add_argument("--activations", default="bf16")
    parser.add_argument("--peer-url", metavar="URL", help="an OpenAI server that runs already")
    args = parser.parse_args()
    path = model_path(args.model)
    figures: list[Figure] = []
    with serving(path, args) as url:
        ours = Load(url, args, args.clients, args.requests)
        with open_peer(args) as peer:
            theirs = Load(start_peer(peer, path, args), args, args.clients, args.requests, PEER)
            figures += measure("llama.cpp", ours, theirs if peer else None, args, target=4.0)
        if args.peer_url:
            other = Load(args.peer_url, args, args.clients, args.requests)
            figures += measure(args.peer_url, ours, other, args, target=1.3)
        figures.append(measure_overhead(url, path, args))
        busiest = max(result["client_load"] for result in ours.results.values())
    report(figures, args, note=f"the load generator used up to {busiest:.1%} of a core")


PEER = {"cache_prompt": False}
"""Spares the peer the upkeep of a cache that no prompt could use."""


@dataclass
class Load:
    """Sends the same traffic again and again, each time with other prompts."""

    url: str
    args: Namespace
    clients: int
    requests: int
    extra_body: dict[str, Any] = field(default_factory=dict)
    results: dict[float, dict[str, Any]] = field(default_factory=dict)  # by output rate
    seeds: Iterator[int] = field(default_factory=count)

    def run(self) -> float:
        """Output tokens a second; the whole result is kept."""
        requests = make_requests(self.args, self.requests, seed=next(self.seeds))
        result = asyncio.run(self._run(requests))
        rate = float(result["output_throughput"])
        self.results[rate] = result
        return rate

    def series(self, rates: Series, key: str) -> Series:
        """Another quantity of the runs that gave `rates`."""
        values = [float(self.results[rate][key]) for rate in rates.values]
        return Series(values=values, others=rates.others)

    async def _run(self, requests: list[LoadRequest]) -> dict[str, Any]:
        options = TargetOptions(base_url=self.url, ignore_eos=True, extra_body=self.extra_body)
        with Target(options) as target:
            await target.find_model()
            timed = [(0.0, request) for request in requests]
            run = await run_load(target, timed, max_concurrency=self.clients)
        if failed := failures(run.records):
            raise SystemExit(f"{self.url}: {dict(failed)}")
        result = summarize(run.records, run.duration_s, _METRICS)
        assert result["total_output_tokens"] == sum(request.output_len for request in requests)
        return {**result, "client_load": run.client_load}


@dataclass(kw_only=True)
class LatencyFigure(Figure):
    """The target is the largest ratio to the peer that is wanted."""

    @property
    def is_met(self) -> bool | None:
        if self.target is None or self.peer is None:
            return None
        return self.ours.median <= self.target * self.peer.median

    def row(self) -> list[str]:
        row = super().row()
        row[4] = row[4].replace(">=", "<=")
        return row


def make_requests(args: Namespace, num_requests: int, *, seed: int) -> list[LoadRequest]:
    options = DatasetOptions(
        num_prompts=num_requests,
        seed=seed,
        input_len=args.input_len,
        output_len=args.output_len,
    )
    return load_dataset(options, ID_VOCABULARY, None)


def measure(
    peer_name: str, ours: Load, theirs: Load | None, args: Namespace, *, target: float
) -> list[Figure]:
    """Output rate, time to the first token, and time between tokens."""
    name = f"{args.model}, {args.activations}, {ours.clients} clients, peer {peer_name}"
    rate = compare(
        f"{name}: output",
        "tok/s",
        ours.run,
        theirs.run if theirs else None,
        args=args,
        target=target,
    )
    figures = [rate]
    for key, what in (("p50_ttft_ms", "TTFT p50"), ("p99_itl_ms", "ITL p99")):
        figures.append(
            LatencyFigure(
                name=f"{name}: {what}",
                unit="ms",
                ours=ours.series(rate.ours, key),
                peer=theirs.series(rate.peer, key) if theirs and rate.peer else None,
                target=1.0,
            )
        )
    return figures


def measure_overhead(url: str, path: str, args: Namespace) -> Figure:
    """The rate over HTTP with many clients, against `LLM.generate` on the same prompts."""
    num_requests = 2 * args.many_clients
    first_seed = 1000  # other prompts than before, as the server still knows those
    http = Load(url, args, args.many_clients, num_requests, seeds=count(first_seed))
    seeds = count(first_seed)
    with LLM(path, activations=args.activations, threads=args.threads) as llm:

        def in_process() -> float:
            requests = make_requests(args, num_requests, seed=next(seeds))
            params = SamplingParams(temperature=0, max_tokens=args.output_len, ignore_eos=True)
            started_s = time.perf_counter()
            outputs = llm.generate([request.prompt for request in requests], params)
            wall_s = time.perf_counter() - started_s
            return sum(output.num_output_tokens for output in outputs) / wall_s

        return compare(
            f"{args.model}, {args.activations}, {args.many_clients} clients, peer LLM.generate",
            "output tok/s",
            http.run,
            in_process,
            args=args,
            target=0.9,
        )


@contextmanager
def serving(path: str, args: Namespace) -> Iterator[str]:
    """`tokenmill serve` in a process of its own; gives its address."""
    command = [sys.executable, "-m", "tokenmill.cli", "serve", "--model", path, "--port", "0"]
    command += ["--threads", str(args.threads), "--activations", args.activations]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        yield _wait_until_ready(process)
    finally:
        process.terminate()
        process.wait(timeout=STOP_TIMEOUT_S)


def _wait_until_ready(process: "subprocess.Popen[str]") -> str:
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("ready: "):
            # Its log must not fill the pipe, or it would stand still.
            threading.Thread(target=deque, args=(process.stderr, 0), daemon=True).start()
            return line.split()[1]
    raise SystemExit(f"tokenmill serve ended: {''.join(lines[-3:]).strip()}")


def start_peer(peer: Peer | None, path: str, args: Namespace) -> str:
    """Have llama.cpp serve the file over HTTP; gives its address."""
    port = _free_port()
    if peer:
        peer.load(
            path,
            threads=args.threads,
            context=args.clients * (args.input_len + args.output_len + 1),
            slots=args.clients,
            kv_unified=True,
            cont_batching=True,
            port=port,
        )
    return f"http://127.0.0.1:{port}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()

"""What the benchmarks share: a peer in its own process, alternating repeats, ratios, a table.

A figure is compared with a run of llama.cpp (the `xllamacpp` wheel) on the same file, with as many
threads, moments later. `--peer-python` (or TOKENMILL_PEER_PYTHON) names the interpreter of an
environment that has it: python -m venv peer && peer/bin/pip install xllamacpp numpy.
"""

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from tokenmill.models.sources import fetch

PEER_SCRIPT = Path(__file__).with_name("peer.py")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_MAX_OTHERS = 0.05  # of the machine's CPU time: above it, a sample is taken again
_PAUSE_S = 2.0


def make_parser(description: str, *, model: str = "smollm2") -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--model", default=model, help="alias or .gguf file (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs (default: 5)")
    parser.add_argument(
        "--patience",
        type=float,
        default=120,
        metavar="SECONDS",
        help="how long to repeat runs that other processes disturbed (default: 120)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument(
        "--peer-python",
        default=os.environ.get("TOKENMILL_PEER_PYTHON"),
        help="interpreter that has xllamacpp; without it, only tokenmill is measured",
    )
    return parser


def model_path(name: str) -> str:
    """The .gguf file behind a model's name; both sides read it."""
    path = fetch(name).path
    if path.suffix == ".gguf":
        return str(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise SystemExit(f"{name} is not a single .gguf file, which the peer needs")
    return str(files[0])


def random_prompts(lengths: Sequence[int], *, seed: int, vocab_size: int) -> list[list[int]]:
    """Prompts of uniformly random token ids; neither side looks at what they mean."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]


class Peer:
    """llama.cpp in a process of its own; see peer.py for the requests."""

    def __init__(self, python: str) -> None:
        # A run that is ended early must not leave the peer computing: SIGTERM closes it too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        self._process = subprocess.Popen(
            [python, str(PEER_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def load(
        self, model: str, *, threads: int, context: int, slots: int = 1, **options: Any
    ) -> str:
        """Start its server, in place of the one before; returns the peer's version."""
        answer = self.ask(
            op="load", model=model, threads=threads, context=context, slots=slots, options=options
        )
        return str(answer["version"])

    def complete(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Greedy, end of sequence ignored: `wall_s` of all, llama.cpp's `timings` of each."""
        return self.ask(op="complete", prompts=prompts, max_tokens=max_tokens)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer ended with status {self._process.wait()}: {request['op']}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def open_peer(args: argparse.Namespace) -> AbstractContextManager[Peer | None]:
    """The peer that `--peer-python` names, or None."""
    return Peer(args.peer_python) if args.peer_python else nullcontext()


@dataclass(kw_only=True)
class Series:
    """Samples of one quantity, and the share of CPU time that others took during each."""

    values: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.4g} ({min(self.values):.4g}..{max(self.values):.4g})"


@dataclass(kw_only=True)
class Figure:
    """One line of a report; `target` bounds the ratio to the peer, or our own value."""

    name: str
    unit: str
    ours: Series
    peer: Series | None = None
    target: float | None = None
    is_relative: bool = True  # the target is one for the ratio

    @property
    def ratios(self) -> list[float]:
        """Ours over the peer's, pair by pair."""
        if self.peer is None:
            return []
        return [a / b for a, b in zip(self.ours.values, self.peer.values, strict=True)]

    @property
    def is_met(self) -> bool | None:
        if self.target is None or (self.is_relative and self.peer is None):
            return None
        reached = statistics.median(self.ratios) if self.is_relative else self.ours.median
        return reached >= self.target if self.is_relative else reached <= self.target  # seconds

    def row(self) -> list[str]:
        ratios, spread = self.ratios, "-"
        if ratios:
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        relation = ">=" if self.is_relative else "<="
        target = "" if self.target is None else f"{relation} {self.target:g}"
        verdict = {None: "", True: "met", False: "missed"}[self.is_met]
        others = max(self.ours.others + (self.peer.others if self.peer else []))
        return [
            f"{self.name}, {self.unit}",
            str(self.ours),
            str(self.peer or "-"),
            spread,
            f"{target} {verdict}".strip(),
            f"{others:.0%}",
        ]


def compare(
    name: str,
    unit: str,
    ours: Callable[[], float],
    theirs: Callable[[], float] | None,
    *,
    args: argparse.Namespace,
    target: float | None = None,
    is_relative: bool = True,
    is_warm: bool = False,
) -> Figure:
    """Run both in turn. A pair that other processes disturbed is taken again while there is time.

    Unless `is_warm`, each side runs once before, unmeasured: to compile, to fault pages in, to
    fill caches.
    """
    sides = [ours, theirs] if theirs else [ours]
    series = [Series() for _ in sides]
    for side in [] if is_warm else sides:
        side()
    deadline_s = time.monotonic() + args.patience
    while len(series[0].values) < args.repeats:
        samples = [_sample(side) for side in sides]
        if max(others for _, others in samples) > _MAX_OTHERS and time.monotonic() < deadline_s:
            time.sleep(_PAUSE_S)
            continue
        for one, (value, others) in zip(series, samples, strict=True):
            one.values.append(value)
            one.others.append(others)
    return Figure(
        name=name,
        unit=unit,
        ours=series[0],
        peer=series[1] if theirs else None,
        target=target,
        is_relative=is_relative,
    )


def _sample(run: Callable[[], float]) -> tuple[float, float]:
    """What a run gave, and the share of the machine's CPU time that went to other processes."""
    total_s, busy_s, own_s = (*_machine_times(), _own_cpu_s())
    value = run()
    after_total_s, after_busy_s, after_own_s = (*_machine_times(), _own_cpu_s())
    foreign_s = (after_busy_s - busy_s) - (after_own_s - own_s)
    return value, max(0.0, foreign_s / max(after_total_s - total_s, _TICK_S))


def _machine_times() -> tuple[float, float]:
    """Seconds of all CPUs since the start of the machine, and how many of them were busy."""
    fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle, iowait = fields[3:5]
    return sum(fields) * _TICK_S, (sum(fields) - idle - iowait) * _TICK_S


def _own_cpu_s() -> float:
    """CPU seconds of this process and its children, those that run and those that have ended."""
    own = os.times()
    ticks = 0
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        words = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        ticks += int(words[11]) + int(words[12])
    return own.user + own.system + own.children_user + own.children_system + ticks * _TICK_S


def report(figures: Sequence[Figure], args: argparse.Namespace, *, note: str = "") -> None:
    """Print the table; write it where `--json` says. Exits 1 if a target was missed."""
    machine = describe_machine()
    print(f"{machine}; {args.threads} threads; {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    if note:
        print(note)
    heads = ["figure", "ours", "peer", "ours/peer", "target", "others"]
    print_table([heads, *(figure.row() for figure in figures)])
    if args.json:
        results = [asdict(f) | {"ratios": f.ratios, "is_met": f.is_met} for f in figures]
        document = {"machine": machine, "threads": args.threads, "figures": results}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if any(figure.is_met is False for figure in figures):
        sys.exit(1)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows as a Markdown table; the first is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for index, row in enumerate(rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("| " + " | ".join(cells) + " |")
        if index == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def describe_machine() -> str:
    """The processor, as the kernel names it, and the number of CPUs that we may use."""
    facts = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    name = facts.get("model name", platform.machine())
    family = f" (family {facts['cpu family']}, model {facts['model']})" if "model" in facts else ""
    return f"{name}{family}, {len(os.sched_getaffinity(0))} CPUs"

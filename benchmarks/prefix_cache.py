"""Block hit rate of the prefix cache on real traffic, against an ideal LRU cache of the same size.

    python benchmarks/prefix_cache.py mooncake_conversation.jsonl

Replays the beginning of a Mooncake trace (github.com/kvcache-ai/Mooncake, FAST25) through the real
scheduler, block pool and step builder. The model is fake: its tokens are random, and its steps take
simulated time. Lengths and hash blocks are divided by 16, so a hash id stands for 32 tokens.

The ideal cache sees whole prompts, one after the other, in order of arrival: nothing runs that
would hold blocks, no answers are stored, nothing comes before what it shares has been computed.
"""

import argparse
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import numpy as np
from common import print_table

from tokenmill.backends.base import BLOCK_SIZE, StepInput, StepLimits, StepOutput
from tokenmill.engine.sequence import Sequence, make_sequence
from tokenmill.engine.step_loop import StepLoop
from tokenmill.kv.block_hash import extend_names, root_name
from tokenmill.loadgen.datasets import DatasetOptions, load_dataset
from tokenmill.loadgen.records import LoadRequest
from tokenmill.loadgen.vocabulary import Vocabulary
from tokenmill.sampling.params import SamplingParams

VOCAB_SIZE = 49_152
SLOTS = 64


@dataclass
class SimulatedModel:
    """Each step takes `step_s` and `token_s` for each of its tokens; tokens are random."""

    limits: StepLimits
    step_s: float
    token_s: float
    now_s: float = 0.0
    num_steps: int = 0
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    _posted: tuple[int, int] | None = None

    def post(self, step: StepInput) -> None:
        assert self._posted is None
        self._posted = (len(step.tokens), len(step.rows))

    def wait(self) -> StepOutput:
        assert self._posted is not None
        (num_tokens, num_rows), self._posted = self._posted, None
        self.now_s += self.step_s + self.token_s * num_tokens
        self.num_steps += 1
        tokens = self._rng.integers(VOCAB_SIZE, size=num_rows, dtype=np.int32)
        return StepOutput(tokens=tokens, logits=None)

    def close(self) -> None:
        assert self._posted is None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, help="a Mooncake trace, as JSON lines")
    parser.add_argument("--seconds", type=float, default=600, help="of the trace (default: 600)")
    parser.add_argument("--divisor", type=int, default=16, help="of lengths (default: 16)")
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[4_000, 8_000, 16_000, 32_000, 100_000]
    )
    parser.add_argument("--step-ms", type=float, default=2.0, help="of a step (default: 2)")
    parser.add_argument("--token-us", type=float, default=100.0, help="of a token (default: 100)")
    parser.add_argument("--target", type=float, default=0.95, help="share of the ideal's hits")
    args = parser.parse_args()
    requests = load_requests(args.trace, args.seconds, args.divisor)
    names = [block_names(request) for request in requests]
    num_blocks = sum(map(len, names))
    print(f"{len(requests)} requests, {num_blocks} full blocks of {BLOCK_SIZE} tokens in prompts")
    rows = [["blocks", "hit rate", "ideal LRU", "share", "preemptions", "steps", "wall, s"]]
    missed = False
    for size in args.blocks:
        started_s = time.perf_counter()
        loop, hits = replay(requests, size, args.step_ms / 1e3, args.token_us / 1e6)
        wall_s = time.perf_counter() - started_s
        ideal = ideal_hits(names, size)
        share = hits / ideal
        missed |= share < args.target
        counters = loop.scheduler.counters
        rates = [f"{hits / num_blocks:.2%}", f"{ideal / num_blocks:.2%}", f"{share:.2%}"]
        counts = [str(counters.num_preemptions), str(counters.num_steps), f"{wall_s:.1f}"]
        rows.append([str(size), *rates, *counts])
    print_table(rows)
    print(f"target: {args.target:.0%} of the ideal: {'missed' if missed else 'met'}")
    sys.exit(missed)


def load_requests(trace: Path, seconds: float, divisor: int) -> list[LoadRequest]:
    options = DatasetOptions(
        name="mooncake", path=trace, trace_seconds=seconds, length_divisor=divisor
    )
    return load_dataset(options, Vocabulary(range(VOCAB_SIZE)), None)


def block_names(request: LoadRequest) -> list[bytes]:
    assert isinstance(request.prompt, list)
    names: list[bytes] = []
    extend_names(names, root_name(""), request.prompt)
    return names


def ideal_hits(requests: SequenceOf[list[bytes]], num_blocks: int) -> int:
    """Blocks found by prompts, up to the first that is missing, in a cache of `num_blocks`."""
    cache: OrderedDict[bytes, None] = OrderedDict()
    hits = 0
    for names in requests:
        hits += sum(1 for _ in takewhile(cache.__contains__, names))
        for name in reversed(names):
            cache.pop(name, None)
            cache[name] = None
        while len(cache) > num_blocks:
            cache.popitem(last=False)
    return hits


def replay(
    requests: SequenceOf[LoadRequest], num_blocks: int, step_s: float, token_s: float
) -> tuple[StepLoop, int]:
    """Run all requests, each from its arrival on; returns the loop and the blocks found."""
    longest = max(request.prompt_len + request.output_len for request in requests)
    limits = StepLimits(
        tokens=512,
        sequences=SLOTS,
        rows=SLOTS,
        blocks=num_blocks,
        blocks_per_sequence=-(-longest // BLOCK_SIZE),
        slots=SLOTS,
        vocab_size=VOCAB_SIZE,
    )
    model = SimulatedModel(limits, step_s, token_s)
    loop = StepLoop(model)
    sequences = [make(request, limits, longest) for request in requests]
    arrived = 0
    while arrived < len(sequences) or loop.has_work:
        while arrived < len(sequences) and arrival_s(requests[arrived]) <= model.now_s:
            loop.scheduler.add(sequences[arrived])
            arrived += 1
        if loop.has_work:
            loop.turn()
        else:
            model.now_s = arrival_s(requests[arrived])
    loop.scheduler.check()
    return loop, sum((sequence.num_cached or 0) // BLOCK_SIZE for sequence in sequences)


def arrival_s(request: LoadRequest) -> float:
    assert request.arrival_s is not None
    return request.arrival_s


def make(request: LoadRequest, limits: StepLimits, longest: int) -> Sequence:
    assert isinstance(request.prompt, list)
    params = SamplingParams(temperature=0, max_tokens=request.output_len, ignore_eos=True)
    return make_sequence(
        "a prompt",
        request.prompt,
        params,
        seed=0,
        eos_ids=(),
        limits=limits,
        max_model_len=longest,
    )


if __name__ == "__main__":
    main()

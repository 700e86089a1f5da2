"""Decode and prefill rates of each instruction set here, relative to the best one.

    python benchmarks/instruction_sets.py --activations bf16 int8

Every sample is a process of its own with TOKENMILL_ISA set; rounds go through all rows in turn.
"""

import os
import statistics
import subprocess
import sys
from argparse import Namespace

from common import describe_machine, make_parser, model_path, print_table, random_prompts

from tokenmill import LLM, SamplingParams
from tokenmill.backends.llvm.target import ROWS, missing_features


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--prompt", type=int, default=512, help="tokens to prefill (default: 512)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens (default: 64)")
    parser.add_argument("--activations", nargs="+", default=["bf16", "int8"])
    parser.add_argument(
        "--rows", nargs="+", default=[r.name for r in ROWS if not missing_features(r)]
    )
    parser.add_argument("--sample", metavar="ACTIVATIONS", help="print one sample and end")
    args = parser.parse_args()
    if args.sample:
        print(*sample(args))
        return
    print(f"{describe_machine()}; {args.threads} threads; {args.model}")
    table = [["row", "activations", "decode tok/s", "of best", "prefill tok/s", "of best"]]
    for activations in args.activations:
        table += compare(activations, args)
    print_table(table)


def compare(activations: str, args: Namespace) -> list[list[str]]:
    """Lines of the table for one kind of activations."""
    samples: dict[str, list[list[float]]] = {name: [] for name in args.rows}
    for _ in range(args.repeats):
        for name, found in samples.items():
            command = [sys.executable, __file__, "--sample", activations, "--model", args.model]
            command += ["--threads", str(args.threads), "--tokens", str(args.tokens)]
            command += ["--prompt", str(args.prompt)]
            done = subprocess.run(
                command,
                env=os.environ | {"TOKENMILL_ISA": name},
                stdout=subprocess.PIPE,
                check=True,
            )
            found.append([float(word) for word in done.stdout.split()])
    rates = {n: [statistics.median(r) for r in zip(*s, strict=True)] for n, s in samples.items()}
    best = next(iter(rates.values()))
    return [
        [name, activations, f"{d:.1f}", f"{d / best[0]:.2f}", f"{p:.0f}", f"{p / best[1]:.2f}"]
        for name, (d, p) in rates.items()
    ]


def sample(args: Namespace) -> tuple[float, float]:
    """Decode and prefill rates of the row that TOKENMILL_ISA names, after a run to warm up."""
    path = model_path(args.model)
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    with LLM(
        path, activations=args.sample, threads=args.threads, enable_prefix_caching=False
    ) as llm:
        vocab_size = llm.loaded.compiled.limits.vocab_size
        prompts = random_prompts([args.prompt] * 2, seed=1, vocab_size=vocab_size)
        for prompt in prompts:
            [output] = llm.generate([prompt], params)
    first_s = output.timings.first_token_s
    assert first_s is not None
    return (args.tokens - 1) / (output.timings.total_s - first_s), args.prompt / first_s


if __name__ == "__main__":
    main()

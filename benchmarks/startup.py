"""Wall time from the start of the process to the first byte of text on its standard output.

    python benchmarks/startup.py --peer-python peer/bin/python

"Second start": everything that tokenmill keeps on disk is there. "First start": the model's file is
there, and nothing else (an empty TOKENMILL_HOME). The file is in the page cache in both.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from common import PEER_SCRIPT, Figure, compare, make_parser, model_path, report

PROMPT = "The capital of France is"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--activations", default="bf16")
    parser.add_argument("--second-target", type=float, default=0.7, metavar="SECONDS")
    parser.add_argument("--first-target", type=float, default=6.0, metavar="SECONDS")
    args = parser.parse_args()
    path = model_path(args.model)
    tokenmill = [sys.executable, "-m", "tokenmill.cli", "run", PROMPT, "--model", path]
    tokenmill += ["--activations", args.activations, "--threads", str(args.threads)]
    tokenmill += ["--temperature", "0", "--max-tokens", "8"]
    llama = [args.peer_python, str(PEER_SCRIPT), "first-token", path, str(args.threads), PROMPT]

    def first() -> float:
        with tempfile.TemporaryDirectory() as home:
            return first_byte_s(tokenmill, home)

    def theirs() -> float:
        return first_byte_s(llama)

    def figure(name: str, ours: Callable[[], float], target: float) -> Figure:
        baseline = theirs if args.peer_python else None
        name = f"{Path(args.model).name}, {name}"
        return compare(name, "s", ours, baseline, args=args, target=target, is_relative=False)

    with tempfile.TemporaryDirectory() as home:
        second = partial(first_byte_s, tokenmill, home)
        figures = [
            figure("second start", second, args.second_target),
            figure("first start", first, args.first_target),
        ]
    report(figures, args)


def first_byte_s(command: Sequence[str], home: str | None = None) -> float:
    """Seconds until the process writes its first byte; it is then waited for."""
    environment = os.environ | ({"TOKENMILL_HOME": home} if home else {})
    started_s = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout
        first = process.stdout.read(1)
        elapsed_s = time.perf_counter() - started_s
        _, errors = process.communicate()
    if not first or process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {errors.decode()}")
    return elapsed_s


if __name__ == "__main__":
    main()

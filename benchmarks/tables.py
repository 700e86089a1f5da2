"""Whether start and compilation grow with the number of instruction sets and weight formats known.

    python benchmarks/tables.py --more 50

"Ours" is a process whose tables have so many more rows, "peer" the same without: wall time from its
start to the first byte of text, and all its CPU time, which others on the machine disturb less.
Instruction sets are put before all others, and need what no processor has; formats are copies of
q4, packings included.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import Figure, compare, make_parser, model_path, report
from startup import PROMPT, first_byte_s

CHILD = "--as-tokenmill"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--more", type=int, default=50, help="rows of each table (default: 50)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        report(figures(args, Path(home)), args)


def figures(args: argparse.Namespace, home: Path) -> list[Figure]:
    run = ["run", PROMPT, "--model", model_path(args.model), "--temperature", "0"]
    run += ["--max-tokens", "8", "--threads", str(args.threads)]

    def command(more: int) -> list[str]:
        return [sys.executable, __file__, CHILD, str(more), *run]

    def second(more: int) -> float:
        return first_byte_s(command(more), str(home))

    def compiling(more: int) -> float:
        shutil.rmtree(home / "objects")
        return second(more)

    def figure(name: str, unit: str, side: Callable[[int], float]) -> Figure:
        name = f"{Path(args.model).name}, {name}, {args.more} more rows and formats"
        return compare(name, unit, partial(side, args.more), partial(side, 0), args=args)

    return [
        figure("second start", "s", second),
        figure("second start", "CPU s", partial(cpu_s, second)),
        figure("start that compiles", "s", compiling),
        figure("start that compiles", "CPU s", partial(cpu_s, compiling)),
    ]


def cpu_s(run: Callable[[int], float], more: int) -> float:
    """CPU seconds of the process that `run` starts and waits for."""
    before = os.times()
    run(more)
    after = os.times()
    spent_s = after.children_user - before.children_user
    return spent_s + after.children_system - before.children_system


def run_with_more(more: int, arguments: list[str]) -> None:
    """tokenmill's command line in this process, with longer tables."""
    lengthen_tables(more)
    from tokenmill.cli.main import main as run

    sys.argv = ["tokenmill", *arguments]
    sys.exit(run())


def lengthen_tables(more: int) -> None:
    """Before any module is imported that makes something of them."""
    from tokenmill.ir.formats import FORMATS

    q4 = FORMATS["q4"]
    names = [f"more_{index}" for index in range(more)]
    FORMATS.update({name: replace(q4, name=name) for name in names})
    from tokenmill.backends.llvm import target
    from tokenmill.backends.llvm.packing import PACKINGS

    packings = [packing for key, packing in PACKINGS.items() if key[0] == "q4"]
    PACKINGS.update({(n, p.dot): replace(p, format=n) for n in names for p in packings})
    best = target.ROWS[0]
    rows = (replace(best, name=name, required=(*best.required, name)) for name in names)
    target.ROWS = (*rows, *target.ROWS)  # type: ignore[misc]


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        run_with_more(int(sys.argv[2]), sys.argv[3:])
    main()

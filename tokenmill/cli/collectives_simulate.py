"""`tokenmill collectives simulate`: a table of algorithms, JSON, and a picture."""

import json
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.cli import collectives_arguments as shared
from tokenmill.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenmill.collectives.study import Row, Study

_SIZES = [float(8 << shift) for shift in range(0, 29, 2)]
"""8 B to 2 GiB, for the picture."""


def add_arguments(parser: ArgumentParser) -> None:
    shared.add_task_arguments(parser, ranks=8, slices=None)
    parser.add_argument(
        "--size",
        default="64K",
        metavar="BYTES",
        help="of the full vector: 8, 64K, 16M, 1G (default: %(default)s)",
    )
    parser.add_argument(
        "--algorithms", nargs="+", default=(), metavar="NAME", help="only these (default: all)"
    )
    shared.add_link_arguments(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--simulate-all",
        action="store_true",
        help="simulate what takes long, too (default: compute that by formula)",
    )
    how.add_argument("--formulas", action="store_true", help="simulate nothing")
    parser.add_argument(
        "--every-rank",
        action="store_true",
        help="simulate each rank, also where one host can stand for all (1,024 take a minute)",
    )
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw time over size and over ranks, as SVG"
    )


def simulate(values: dict[str, Any]) -> None:
    """Print the table, or the object, and write the picture."""
    from tokenmill.collectives.study import Study, make_plans
    from tokenmill.collectives.tuner import choose

    task, topology = shared.make_task(values), shared.make_topology(values)
    num_bytes = 0 if task.op == "barrier" else shared.read_size(values["size"])
    plans = make_plans(task, topology, algorithms=values["algorithms"], width=values["width"])
    if not plans:
        raise UsageError(
            f"no algorithm of {task.op} fits {topology.ranks} ranks as they are spread"
        )
    simulates = True if values["simulate_all"] else False if values["formulas"] else None
    study = Study(
        task=task,
        topology=topology,
        plans=plans,
        simulates=simulates,
        is_exact=values["every_rank"],
        slices=_slices(values),
    )
    rows = sorted(study.rows(num_bytes), key=lambda row: row.time_s)
    reason = choose(task, topology, num_bytes).reason
    if values["json"]:
        print(json.dumps(_document(study, rows, num_bytes, reason)))
    else:
        print("\n".join(_table(study, rows, num_bytes)))
        print(f"\nThe tuner takes: {reason}.")
    if values["plot"] is not None:
        _draw(values["plot"], study, rows, num_bytes)


def _slices(values: dict[str, Any]) -> int | None:
    slices: int | None = values["slices"]
    if slices is not None and slices < 1:
        raise UsageError(f"--slices is {slices}, but must be at least 1")
    return slices


def _document(
    study: "Study", rows: "Sequence[Row]", num_bytes: int, reason: str
) -> dict[str, object]:
    from dataclasses import asdict

    topology = study.topology
    return {
        "op": study.task.op,
        "ranks": topology.ranks,
        "hosts": topology.hosts,
        "size_bytes": num_bytes,
        "links": asdict(topology.links),
        "algorithms": [asdict(row) for row in rows],
        "choice": reason,
        "over_ranks": {
            name: [dict(zip(("ranks", "steps", "time_s"), point, strict=True)) for point in points]
            for name, points in study.over_ranks(num_bytes).items()
        },
    }


def _table(study: "Study", rows: "Sequence[Row]", num_bytes: int) -> list[str]:
    from tokenmill.collectives.words import size_words, time_words

    topology = study.topology
    size = "" if study.task.op == "barrier" else f" of {size_words(num_bytes)}"
    title = f"{study.task.op}{size}, {topology.ranks} ranks on {topology.hosts} hosts"
    head = (
        "algorithm",
        "slices",
        "steps",
        "sent/rank",
        "uplink",
        "time",
        "busbw GB/s",
        "NCCL latency",
        "by",
    )
    cells = [head]
    for row in rows:
        uplink = "" if row.uplink_bytes is None else size_words(row.uplink_bytes)
        nccl = "" if row.nccl_latency_s is None else time_words(row.nccl_latency_s)
        cells.append(
            (
                row.algorithm,
                str(row.slices),
                f"{row.num_steps:,}",
                size_words(row.bytes_sent),
                uplink,
                time_words(row.time_s),
                f"{row.busbw / 1e9:.3g}",
                nccl,
                row.source,
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in (0, len(head) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return [title, "", lines[0], "-" * len(lines[0]), *lines[1:]]


def _draw(path: Path, study: "Study", rows: "Sequence[Row]", num_bytes: int) -> None:
    from tokenmill.collectives.plot import draw_study
    from tokenmill.collectives.study import FORMULA
    from tokenmill.collectives.words import size_words
    from tokenmill.loadgen.report import save_text

    title = f"{study.task.op} over {study.topology.ranks} ranks on {study.topology.hosts} hosts"
    picture = draw_study(
        title,
        over_sizes=study.over_sizes(_SIZES),
        over_ranks=study.over_ranks(num_bytes),
        simulated=[(row.algorithm, num_bytes, row.time_s) for row in rows if row.source != FORMULA],
        size=size_words(num_bytes),
    )
    save_text(path, picture)
    print(f"saved {path}", file=sys.stderr)

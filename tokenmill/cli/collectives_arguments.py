"""Arguments that the actions of `tokenmill collectives` share, and what is made of them."""

from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.errors import UsageError

if TYPE_CHECKING:
    from tokenmill.collectives.task import Task
    from tokenmill.collectives.topology import Links, Topology

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_task_arguments(parser: ArgumentParser, *, ranks: int, slices: int | None) -> None:
    """What `make_task` takes, and the shape; None: as many slices as are best."""
    parser.add_argument(
        "--op",
        default="all_reduce",
        metavar="OP",
        help="all_reduce, reduce, broadcast, all_gather, reduce_scatter, all_to_all, send_recv or "
        "barrier; allreduce and all-reduce do, too (default: %(default)s)",
    )
    for flag, default, text in (
        ("--ranks", ranks, "processes that take part"),
        ("--hosts", 1, "hosts over which they spread evenly"),
        ("--slices", slices, "parts that follow one another through the algorithm"),
    ):
        shown = "as many as are best" if default is None else "%(default)s"
        parser.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{text} (default: {shown})"
        )
    parser.add_argument(
        "--width", type=int, default=0, metavar="X", help="length of a torus' rows (default: fits)"
    )
    parser.add_argument(
        "--root", type=int, default=0, metavar="R", help="of reduce and broadcast (default: 0)"
    )


def make_task(values: dict[str, Any], count: int = 0) -> "Task":
    """The task in the parsed values; UsageError where it makes no sense."""
    from tokenmill.collectives.task import ROOTED_OPS, Task

    op, ranks, root = read_op(values["op"]), values["ranks"], values["root"]
    if op not in ROOTED_OPS:
        root = 0
    peer = (root + 1) % max(1, ranks) if op == "send_recv" else 0
    return Task(op=op, ranks=ranks, count=0 if op == "barrier" else count, root=root, peer=peer)


def read_op(text: str) -> str:
    """`all_reduce` of allreduce, all-reduce, AllReduce. Raises UsageError."""
    from tokenmill.collectives.task import OPS

    plain = text.lower().replace("-", "").replace("_", "")
    aliases = {op.replace("_", ""): op for op in OPS} | {"alltoall": "all_to_all"}
    if plain not in aliases:
        raise UsageError(f"--op is {text!r}, but must be one of {', '.join(OPS)}")
    return aliases[plain]


def add_link_arguments(parser: ArgumentParser) -> None:
    """What `make_topology` takes."""
    group = parser.add_argument_group("the cluster")
    group.add_argument(
        "--links",
        default="gpu",
        metavar="NAME",
        help="constants of the links: gpu (NVLink, and 200 Gbit/s for each rank), cpu (shared "
        "memory, and 10 Gbit/s for each host) or a JSON file of fitted ones (default: %(default)s)",
    )
    group.add_argument(
        "--uplinks", type=int, metavar="N", help="ways out of a host (default: as --links has it)"
    )
    group.add_argument(
        "--interleaved",
        action="store_true",
        help="rank r is on host r modulo hosts: what a badly ordered ring costs",
    )


def make_topology(values: dict[str, Any]) -> "Topology":
    """The cluster in the parsed values; UsageError where it makes no sense."""
    from dataclasses import replace

    from tokenmill.collectives.topology import Topology

    links = _read_links(values["links"])
    if values["uplinks"] is not None:
        if values["uplinks"] < 1:
            raise UsageError(f"--uplinks is {values['uplinks']}, but must be at least 1")
        links = replace(links, uplinks=values["uplinks"])
    return Topology(
        ranks=values["ranks"],
        hosts=values["hosts"],
        links=links,
        is_interleaved=values["interleaved"],
    )


def _read_links(name: str) -> "Links":
    from tokenmill.collectives.topology import PRESETS, read_links

    if name in PRESETS:
        return PRESETS[name]
    if not Path(name).suffix:
        raise UsageError(f"--links is {name!r}, but must be {', '.join(PRESETS)} or a JSON file")
    return read_links(Path(name))


def read_size(text: str) -> int:
    """Bytes of `8`, `64K`, `16M`, `1G`, with or without iB or B. Raises UsageError."""
    plain = text.strip().upper().removesuffix("B").removesuffix("I")
    number, unit = (plain[:-1], plain[-1]) if plain[-1:] in ("K", "M", "G") else (plain, "")
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, OverflowError):
        raise UsageError(f"{text!r} is no size: give bytes such as 8, 64K, 16M or 1G") from None
    if size < 1:
        raise UsageError(f"a size is {text}, but must be at least one byte")
    return size

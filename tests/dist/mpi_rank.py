"""A rank that mpiexec starts: runs a function of another test module, and writes its answer.

python -m tests.dist.mpi_rank MODULE FUNCTION FOLDER OPTIONS
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

from tokenmill.collectives.connect_mpi import connect_mpi, import_mpi
from tokenmill.errors import TokenmillError


def main(module: str, function: str, folder: str, options: str) -> None:
    world = import_mpi().COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    body = getattr(importlib.import_module(module), function)
    given = {k: v[rank] if isinstance(v, list) else v for k, v in json.loads(options).items()}
    try:
        with connect_mpi(**given) as ranks:
            answer = body(ranks)
    except TokenmillError as error:
        answer = f"error: {error}"
    Path(folder, str(rank)).write_text(json.dumps(answer))
    if "error: " in str(answer):
        end_when_all_have_answered(Path(folder), size)


def end_when_all_have_answered(folder: Path, size: int) -> None:
    """Without MPI's own end, which does not come in peace where messages were left unreceived."""
    deadline_s = time.monotonic() + 3
    while len(list(folder.iterdir())) < size and time.monotonic() < deadline_s:
        time.sleep(0.02)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])

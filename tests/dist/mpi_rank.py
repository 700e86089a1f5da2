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
    whole = Path(folder, str(rank))
    partial = Path(f"{folder}-{rank}")
    partial.write_text(json.dumps(answer))
    partial.rename(whole)  # at once, as others look for it
    if is_any_error(Path(folder), size):
        os._exit(0)  # an MPI in which a rank failed may not end in peace


def is_any_error(folder: Path, size: int) -> bool:
    """Whether a rank has failed; waits a little for the answers of all."""
    deadline_s = time.monotonic() + 3
    while len(list(folder.iterdir())) < size and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return any("error: " in file.read_text() for file in folder.iterdir())


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A rank that mpiexec starts: runs a function of another test module, and writes its answer.

python -m tests.dist.mpi_rank MODULE FUNCTION FOLDER OPTIONS
"""

import importlib
import json
import os
import sys
from pathlib import Path

from tokenmill.collectives.connect_mpi import connect_mpi, import_mpi
from tokenmill.errors import TokenmillError


def main(module: str, function: str, folder: str, options: str) -> None:
    rank = import_mpi().COMM_WORLD.Get_rank()
    body = getattr(importlib.import_module(module), function)
    given = {k: v[rank] if isinstance(v, list) else v for k, v in json.loads(options).items()}
    try:
        with connect_mpi(**given) as ranks:
            answer = body(ranks)
    except TokenmillError as error:
        answer = f"error: {error}"
    Path(folder, str(rank)).write_text(json.dumps(answer))
    if "error: " in str(answer):
        os._exit(0)  # an MPI in which messages were left unreceived may not end in peace


if __name__ == "__main__":
    main(*sys.argv[1:])

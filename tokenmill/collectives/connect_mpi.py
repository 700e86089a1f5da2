"""A communicator over MPI, where a runtime and mpi4py are installed (extra `mpi`).

    mpiexec -n 4 python -m mpi4py train.py

    with connect_mpi() as ranks:
        ranks.all_reduce(gradients, "avg")

Ranks are those of MPI's communicator. What they say to each other goes through MPI; only the news
that one has failed or gone go through connections of their own. Started with `-m mpi4py`, a rank
that fails ends them all, as is MPI's custom.
"""

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenmill.collectives.calls import Choose
from tokenmill.collectives.choice import choose_plan
from tokenmill.collectives.communicator import Communicator
from tokenmill.collectives.connect import TIMEOUT_S, connect_with, make_introduced_control
from tokenmill.collectives.control_tcp import own_address
from tokenmill.collectives.topology import PRESETS, Links
from tokenmill.collectives.transports.mpi import make_mpi_transport
from tokenmill.errors import CollectiveError, UsageError

if TYPE_CHECKING:
    from mpi4py import MPI

_MOST_BYTES = 1024
"""Of what rank 0 tells the others."""
_MEETING_TAG = 29805
_LOOK_S = 0.0005
_MOST_TAGS = 32767
"""What every MPI has."""
_keyval: int | None = None
"""Under which a communicator remembers ours beside it."""
_num_tags = 0


def connect_mpi(
    comm: "MPI.Intracomm | None" = None,
    *,
    timeout_s: float = TIMEOUT_S,
    address: str | None = None,
    host_id: str | None = None,
    links: Links = PRESETS["cpu"],
    choose: Choose = choose_plan,
) -> Communicator:
    """Join a communicator among the ranks of MPI's (default: COMM_WORLD), all of which call this.
    Rank 0 listens at `address` (default: its own, any port) for news; the rest as for `connect`.

    Raises UsageError, also where there is no MPI, and CollectiveError where the ranks do not come
    together.
    """
    if not timeout_s > 0:
        raise UsageError(f"the timeout is {timeout_s:g} s, but must be above 0")
    mpi = import_mpi()
    whole = comm or mpi.COMM_WORLD
    rank, size = whole.Get_rank(), whole.Get_size()
    sends: list[MPI.Request] = []
    control = make_introduced_control(
        lambda text: sends.extend(_tell(whole, text, peer) for peer in range(1, size)),
        lambda: _hear(whole, rank, timeout_s),
        rank=rank,
        size=size,
        timeout_s=timeout_s,
        address=address or f"{own_address()}:0",
    )
    if rank == 0:
        control.put("tag/0", str(_new_tag()))
    return connect_with(
        control,
        lambda _: make_mpi_transport(
            _own_duplicate(whole, timeout_s), int(control.get("tag/0", timeout_s))
        ),
        timeout_s=timeout_s,
        host_id=host_id,
        links=links,
        choose=choose,
    )


def import_mpi() -> Any:
    """The module mpi4py.MPI, which starts MPI. Raises UsageError where it cannot be had."""
    try:
        from mpi4py import MPI
    except ImportError:
        raise UsageError("mpi4py is not installed: pip install 'tokenmill[mpi]'") from None
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"mpi4py finds no MPI ({reason}): install one, such as the packages mpich or openmpi"
        ) from None
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise UsageError("this MPI does not serve several threads, as asynchronous calls need")
    return MPI


def _new_tag() -> int:
    global _num_tags
    _num_tags += 1
    return _num_tags % _MOST_TAGS


def _own_duplicate(comm: "MPI.Intracomm", timeout_s: float) -> "MPI.Intracomm":
    """A communicator with the same ranks, in which nothing but ours is said; made once, as an MPI
    has but some thousands."""
    from mpi4py import MPI

    global _keyval
    if _keyval is None:
        _keyval = MPI.Comm.Create_keyval()
    known: Any = comm.Get_attr(_keyval)
    if isinstance(known, MPI.Intracomm):
        return known
    made, request = comm.Idup()
    if not _is_done_in_time(request, timeout_s):
        raise CollectiveError(f"MPI has made no communicator within {timeout_s:g} s")
    comm.Set_attr(_keyval, made)
    return made


def _tell(comm: "MPI.Comm", text: str, peer: int) -> "MPI.Request":
    data = text.encode().ljust(_MOST_BYTES)[:_MOST_BYTES]
    return comm.Isend(np.frombuffer(data, np.uint8), peer, _MEETING_TAG)


def _hear(comm: "MPI.Comm", rank: int, timeout_s: float) -> str:
    message = np.empty(_MOST_BYTES, np.uint8)
    request = comm.Irecv(message, 0, _MEETING_TAG)
    if not _is_done_in_time(request, timeout_s):
        request.Cancel()
        request.Wait()
        raise CollectiveError(f"rank {rank}: rank 0 has not come within {timeout_s:g} s")
    return message.tobytes().decode().rstrip()


def _is_done_in_time(request: "MPI.Request", timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not request.Test():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_LOOK_S)
    return True

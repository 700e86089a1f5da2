"""A communicator over a process group that is there already, whatever its backend.

    torch.distributed.init_process_group("gloo")
    with connect_group() as ranks:
        ranks.all_reduce(gradients, "avg")

Ranks are those of the group. What the ranks say to each other goes through the group's send and
recv; only the news that one has failed or gone go through connections of their own.
"""

import os
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from tokenmill.collectives.calls import Choose
from tokenmill.collectives.choice import choose_plan
from tokenmill.collectives.communicator import Communicator
from tokenmill.collectives.connect import TIMEOUT_S, connect_with, make_introduced_control
from tokenmill.collectives.control_tcp import own_address
from tokenmill.collectives.topology import PRESETS, Links
from tokenmill.collectives.torch.links import make_torch_transport
from tokenmill.errors import CollectiveError, UsageError

_MOST_BYTES = 1024
"""Of what rank 0 tells the others."""
_MEETING_TAG = 29805
_num_tags = 0


def listening_address() -> str:
    """Where rank 0 should listen: at its address as the others of the job see it."""
    return f"{own_address(os.environ.get('MASTER_ADDR'))}:0"


def connect_group(
    group: dist.ProcessGroup | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
    address: str | None = None,
    host_id: str | None = None,
    links: Links = PRESETS["cpu"],
    choose: Choose = choose_plan,
) -> Communicator:
    """Join a communicator among the ranks of a group (default: the whole job), all of which call
    this. Rank 0 listens at `address` (default: its own, any port) for news; the rest as for
    `connect`. The group must be able to send tensors on the CPU, and must outlive it.

    Raises UsageError, and CollectiveError where the ranks do not come together.
    """
    if not timeout_s > 0:
        raise UsageError(f"the timeout is {timeout_s:g} s, but must be above 0")
    whole = _checked(group)
    rank, size = dist.get_rank(whole), dist.get_world_size(whole)
    sends: list[tuple[dist.Work, torch.Tensor]] = []
    control = make_introduced_control(
        lambda text: sends.extend(_tell(whole, text, peer) for peer in range(1, size)),
        lambda: _hear(whole, rank, timeout_s),
        rank=rank,
        size=size,
        timeout_s=timeout_s,
        address=address or listening_address(),
    )
    if rank == 0:
        control.put("tag/0", str(_new_tag()))
    return connect_with(
        control,
        lambda _: make_torch_transport(whole, int(control.get("tag/0", timeout_s))),
        timeout_s=timeout_s,
        host_id=host_id,
        links=links,
        choose=choose,
    )


def _checked(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not dist.is_initialized():
        raise UsageError("there is no process group: call torch.distributed.init_process_group")
    whole = group or dist.group.WORLD
    assert whole is not None
    if dist.get_rank(whole) < 0:
        raise UsageError(f"rank {dist.get_rank()} of the job is not in the group")
    names = dist.get_backend_config(whole)
    if "cpu:" not in names:
        raise UsageError(f"the group serves {names}, not the CPU: give one of gloo")
    return whole


def _new_tag() -> int:
    global _num_tags
    _num_tags += 1
    return _MEETING_TAG + _num_tags


def _tell(group: dist.ProcessGroup, text: str, peer: int) -> tuple[dist.Work, torch.Tensor]:
    data = text.encode().ljust(_MOST_BYTES)[:_MOST_BYTES]
    message = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    return group.send([message], peer, _MEETING_TAG), message


def _hear(group: dist.ProcessGroup, rank: int, timeout_s: float) -> str:
    message = torch.empty(_MOST_BYTES, dtype=torch.uint8)
    start_s = time.monotonic()
    try:
        group.recv([message], 0, _MEETING_TAG).wait(timedelta(seconds=timeout_s))
    except RuntimeError:
        is_late = time.monotonic() - start_s >= timeout_s * 0.99
        what = f"has not come within {timeout_s:g} s" if is_late else "has ended"
        raise CollectiveError(f"rank {rank}: rank 0 {what}") from None
    return bytes(message.numpy()).decode().rstrip()

"""Which ranks are on the same host, and the order in which algorithms should go through them."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenmill.collectives.topology import PRESETS, Links, Topology

HOST_ID_VARIABLE = "TOKENMILL_HOST_ID"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def default_host_id() -> str:
    """Of this host: TOKENMILL_HOST_ID, or its name and the number of its boot.

    Containers on one machine have different names, and do not share memory unless told to.
    """
    given = os.environ.get(HOST_ID_VARIABLE)
    if given:
        return given
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    return f"{socket.gethostname()}/{boot_id}"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the ranks are.

    `order` lists them host by host; it is empty where their numbers go so anyway. If hosts have
    different numbers of ranks, the topology knows of one host only, whose links are those between
    hosts, and algorithms in two levels are not to be had.
    """

    host_ids: tuple[str, ...]
    topology: Topology
    order: tuple[int, ...]

    def local_ranks(self, rank: int) -> tuple[int, ...]:
        """The ranks on the host of a rank."""
        here = self.host_ids[rank]
        return tuple(r for r, host_id in enumerate(self.host_ids) if host_id == here)


def make_layout(host_ids: Sequence[str], links: Links = PRESETS["cpu"]) -> Layout:
    """The layout of ranks with these host ids."""
    hosts = list(dict.fromkeys(host_ids))
    members = [[r for r, host_id in enumerate(host_ids) if host_id == host] for host in hosts]
    order = tuple(rank for ranks in members for rank in ranks)
    size = len(host_ids)
    if len({len(ranks) for ranks in members}) == 1:
        topology = Topology(ranks=size, hosts=len(hosts), links=links)
    else:
        flat = Links(
            local=links.remote, remote=links.remote, gamma_s_per_byte=links.gamma_s_per_byte
        )
        topology = Topology(ranks=size, links=flat)
    return Layout(
        host_ids=tuple(host_ids),
        topology=topology,
        order=() if order == tuple(range(size)) else order,
    )

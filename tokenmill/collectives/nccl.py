"""NCCL's own latency model, as a second opinion: base latency and so much for each hop.

From `src/graph/tuning.cc` of NCCL, protocol LL: a ring has 2(p-1) hops, 2h of them between hosts;
hops in a host cost at least what starting a network transfer does. A tree is a chain in the host
and a binary tree between hosts.
"""

from dataclasses import dataclass

from tokenmill.collectives.task import Task
from tokenmill.collectives.topology import Topology
from tokenmill.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class NcclConstants:
    """Microseconds; the defaults are those of the LL protocol on NVLink."""

    ring_base: float = 6.6
    tree_base: float = 6.8
    local: float = 0.6
    remote_ring: float = 2.7
    remote_tree: float = 5.0
    network_overhead: float = 1.0
    """Least cost of any hop of a ring that spans hosts."""


MODELLED = ("ring", "tree")


def nccl_latency_s(
    task: Task, algorithm: str, topology: Topology, constants: NcclConstants | None = None
) -> float:
    """Latency of all-reduce, reduce-scatter or all-gather. Raises UsageError for what NCCL's
    model does not have."""
    constants = constants or NcclConstants()
    ways = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}.get(task.op)
    if ways is None or algorithm not in MODELLED or (algorithm == "tree" and ways == 1):
        raise UsageError(f"NCCL's model has no {algorithm} for {task.op}")
    p, h, m = topology.ranks, topology.hosts, topology.ranks_per_host
    if algorithm == "ring":
        num_remote = (2 * h if ways == 2 else h - 1) if h > 1 else 0
        local = max(constants.local, constants.network_overhead) if h > 1 else constants.local
        num_local = ways * (p - 1) - num_remote
        hops = num_local * local + num_remote * constants.remote_ring
        return (constants.ring_base + hops) * 1e-6
    depth = h.bit_length() - 1  # log2, rounded down as NCCL does
    hops = (m - 1) * constants.local + depth * constants.remote_tree
    return (constants.tree_base + 2 * hops) * 1e-6

"""Bandwidths as nccl-tests report them.

algbw is bytes over time; busbw multiplies it by the share of the bytes that any algorithm must move
over each link, so that it can be held against the speed of the links whatever the number of ranks.
Sizes are those of the full vector. See nccl-tests, doc/PERFORMANCE.md.
"""

from tokenmill.collectives.task import Task


def bus_factor(task: Task) -> float:
    """busbw / algbw."""
    p = task.ranks
    if task.op == "all_reduce":
        return 2 * (p - 1) / p
    if task.op in ("reduce_scatter", "all_gather", "all_to_all"):
        return (p - 1) / p
    return 1.0


def bus_bandwidth(task: Task, num_bytes: float, time_s: float) -> float:
    """Bytes a second; 0 where nothing was moved or no time passed."""
    return bus_factor(task) * num_bytes / time_s if time_s else 0.0

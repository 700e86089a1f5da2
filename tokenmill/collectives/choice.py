"""The default way to choose a plan."""

from tokenmill.collectives.layout import Layout
from tokenmill.collectives.program import Plan
from tokenmill.collectives.task import Task

_SMALL_BYTES = 1 << 16
_SLICE_BYTES = 1 << 18


def choose_plan(
    task: Task,
    layout: Layout,
    num_bytes: int,
    *,
    algorithm: str | None = None,
    slices: int | None = None,
    is_ordered: bool = False,
) -> Plan:
    """By a simple rule: few steps for small vectors, few bytes for large ones."""
    name = algorithm or _rule(task, layout, num_bytes, is_ordered)
    if slices is None:
        is_chain = name == "ring" and task.op in ("broadcast", "reduce")
        slices = max(1, min(64, num_bytes // _SLICE_BYTES)) if is_chain or name == "tree" else 1
    return Plan(algorithm=name, hosts=layout.topology.hosts, slices=slices)


def _rule(task: Task, layout: Layout, num_bytes: int, is_ordered: bool) -> str:
    is_small = num_bytes <= _SMALL_BYTES
    has_levels = 1 < layout.topology.hosts < task.ranks
    if task.op == "all_reduce":
        if is_ordered:
            return "one_shot" if is_small else "two_shot"
        if is_small:
            return "recursive_doubling"
        return "hierarchical" if has_levels else "ring"
    if task.op == "reduce_scatter":
        return "one_shot" if is_small or is_ordered else "hierarchical" if has_levels else "ring"
    if task.op == "all_gather":
        return "recursive_doubling" if is_small else "hierarchical" if has_levels else "ring"
    if task.op == "reduce":
        return "one_shot" if is_ordered else "tree" if is_small else "ring"
    if task.op == "broadcast":
        return "tree" if is_small else "ring"
    return "recursive_doubling" if task.op == "barrier" else "one_shot"

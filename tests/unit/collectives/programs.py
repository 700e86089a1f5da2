"""Tasks and plans to test with."""

from collections.abc import Iterator

from tokenmill.collectives.catalog import Algorithm
from tokenmill.collectives.program import Plan
from tokenmill.collectives.task import ROOTED_OPS, Task


def make_task(op: str, ranks: int, count: int, root: int = 0) -> Task:
    """With a root where the operation has one; the last rank is the peer."""
    if op == "barrier":
        return Task(op=op, ranks=ranks)
    if op in ROOTED_OPS:
        return Task(op=op, ranks=ranks, count=count, root=root, peer=(root - 1) % ranks)
    return Task(op=op, ranks=ranks, count=count)


def least_ranks(op: str) -> int:
    return 2 if op == "send_recv" else 1


def plans(algorithm: Algorithm, ranks: int) -> Iterator[Plan]:
    """Every shape that an algorithm can have with so many ranks."""
    if algorithm.needs_hosts:
        shapes = [{"hosts": h} for h in divisors(ranks)]
    elif algorithm.needs_grid:
        shapes = [{"width": x} for x in divisors(ranks)]
    else:
        shapes = [{}]
    for shape in shapes:
        yield Plan(algorithm=algorithm.name, **shape)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]

"""The proof that a program does its task, by running it on symbols.

An element holds a *sum*: the set of ranks that have contributed, and which of their elements it is.
The run moves and adds sums as the program says; adding one contribution twice, or elements of
different numbers, is an error; at the end every rank must hold what the task promises. Three things
together make the result hold for each way of running that the language allows:

- no two steps of a rank race (`legality.py`), so every order that respects dependencies gives the
  same result;
- the run goes through, one step after the other with sends that do not wait: lists in order cannot
  deadlock;
- the graph of dependencies, in which a send and its receive are one node, has no cycle: run by
  dependencies, the program cannot deadlock even without any buffering. Its longest path counts the
  steps of the table.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from tokenmill.collectives.chains import depths, match
from tokenmill.collectives.legality import ProofError, check_program, fail
from tokenmill.collectives.program import Program, Send
from tokenmill.collectives.symbols import Sum, Symbols, lowest
from tokenmill.collectives.task import Task


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What is known of a proved program."""

    num_messages: int
    num_steps: int
    """Messages on the longest chain of which each waits for the one before."""
    most_sent: int
    """Elements sent by the rank that sends most."""
    is_ordered: bool
    """Every result is the sum in ascending order of rank, in a wide accumulator."""


def prove(program: Program) -> Proof:
    """Raises ProofError where the program is malformed, may deadlock, or does not do its task."""
    check_program(program)
    pairs = match(program)
    depth = depths(program, pairs)
    symbols = Symbols(program)
    _run_in_list_order(program, symbols)
    is_ordered = _compare(program.task, symbols)
    sent = [
        sum(step.chunk.count for step in here.steps if isinstance(step, Send))
        for here in program.ranks
    ]
    return Proof(
        num_messages=len(pairs),
        num_steps=max(max(steps, default=0) for steps in depth),
        most_sent=max(sent),
        is_ordered=is_ordered,
    )


def _run_in_list_order(program: Program, symbols: Symbols) -> None:
    """Each rank in turn, until it must wait for a message. Raises ProofError for a deadlock."""
    done = [0] * len(program.ranks)
    waiting = deque(range(len(program.ranks)))
    queued = set(waiting)
    while waiting:
        rank = waiting.popleft()
        queued.discard(rank)
        here = program.ranks[rank]
        while done[rank] < len(here.steps) and symbols.can_do(rank, here.steps[done[rank]]):
            step = here.steps[done[rank]]
            symbols.do(here, done[rank])
            done[rank] += 1
            if isinstance(step, Send) and step.peer not in queued:
                queued.add(step.peer)
                waiting.append(step.peer)
    for here, index in zip(program.ranks, done, strict=True):
        if index < len(here.steps):
            raise fail(here.rank, index, "deadlock in list order: its message never comes")


def _compare(task: Task, symbols: Symbols) -> bool:
    """Whether all sums are in order. Raises ProofError where a rank holds what it should not."""
    if task.op == "barrier":
        _compare_barrier(symbols)
        return False
    are_ordered = task.is_reducing
    for rank, memory in enumerate(symbols.memory):
        for buffer, bounds, wanted in _expected(task, rank):
            if bounds[0] == bounds[1]:
                continue  # and there may be no such buffer
            for start, stop, held in memory[buffer].read(*bounds):
                if held[:2] != wanted:
                    place = f"rank {rank}: {buffer}[{start}:{stop}]"
                    should = _words(Sum(*wanted, False))
                    raise ProofError(f"{place} ends with {_words(held)}, not {should}")
                are_ordered &= held.is_ordered
    return are_ordered


def _compare_barrier(symbols: Symbols) -> None:
    everyone = (1 << len(symbols.heard)) - 1
    for rank, heard in enumerate(symbols.heard):
        known = 1 << rank
        for ranks in heard:
            known |= ranks
        if known != everyone:
            missing = lowest(everyone & ~known)
            raise ProofError(f"rank {rank} may leave before rank {missing} has entered")


def _expected(task: Task, rank: int) -> Iterator[tuple[str, tuple[int, int], tuple[int, int]]]:
    """What must be held after: buffer, range, and the ranks and the shift of the sum there."""
    everyone = (1 << task.ranks) - 1
    whole = (0, task.count)
    if task.op == "all_reduce" or (task.op == "reduce" and rank == task.root):
        yield "data", whole, (everyone, 0)
    elif task.op == "reduce_scatter":
        yield "data", task.block(rank), (everyone, 0)
    elif task.op == "broadcast" or (task.op == "send_recv" and rank in (task.root, task.peer)):
        yield "data", whole, (1 << task.root, 0)
    elif task.op == "all_gather":
        for source in range(task.ranks):
            yield "data", task.block(source), (1 << source, 0)
    elif task.op == "all_to_all":
        received = task.received_ranges(rank)
        for source in range(task.ranks):
            origin = task.sent_ranges(source)[rank][0]
            yield "output", received[source], (1 << source, origin - received[source][0])


def _words(held: Sum) -> str:
    if not held.ranks:
        return "nothing"
    ranks = [str(rank) for rank in range(held.ranks.bit_length()) if held.ranks >> rank & 1]
    shown = ", ".join(ranks[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"the sum of ranks {shown}"

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
from typing import NamedTuple

from tokenmill.collectives.legality import ProofError, check_program, fail
from tokenmill.collectives.program import (
    Chunk,
    Copy,
    Message,
    Program,
    RankProgram,
    Recv,
    RecvReduce,
    Send,
    Step,
)
from tokenmill.collectives.segments import Segments
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


class _Sum(NamedTuple):
    """What an element holds: contributions (a bit for each rank), and which element of theirs."""

    ranks: int
    shift: int
    """Number of the element at the contributors, less that of the element here."""
    is_ordered: bool


class _Run(NamedTuple):
    """Neighbours in a message, `length` elements that hold the same sum; `origin` is the first."""

    length: int
    ranks: int
    origin: int
    is_ordered: bool


def prove(program: Program) -> Proof:
    """Raises ProofError where the program is malformed, may deadlock, or does not do its task."""
    check_program(program)
    pairs = _match(program)
    num_steps = _longest_chain(program, pairs)
    is_ordered = _Symbols(program).run()
    sent = [
        sum(step.chunk.count for step in here.steps if isinstance(step, Send))
        for here in program.ranks
    ]
    return Proof(
        num_messages=len(pairs), num_steps=num_steps, most_sent=max(sent), is_ordered=is_ordered
    )


class _Pair(NamedTuple):
    """A message: rank and step at both ends; `previous` is the one before on its lane, or -1."""

    source: tuple[int, int]
    target: tuple[int, int]
    previous: int


def _match(program: Program) -> list[_Pair]:
    """Every send with its receive. Raises ProofError where one is alone, or sizes differ."""
    ends: dict[tuple[int, int, int], tuple[list[int], list[int]]] = {}
    for here in program.ranks:
        for index, step in enumerate(here.steps):
            if isinstance(step, Send):
                ends.setdefault((here.rank, step.peer, step.tag), ([], []))[0].append(index)
            elif isinstance(step, Message):
                ends.setdefault((step.peer, here.rank, step.tag), ([], []))[1].append(index)
    pairs = []
    for (source, target, tag), (sends, recvs) in ends.items():
        if len(sends) > len(recvs):
            raise fail(
                source, sends[len(recvs)], f"rank {target} does not receive this (tag {tag})"
            )
        if len(recvs) > len(sends):
            raise fail(target, recvs[len(sends)], f"rank {source} does not send this (tag {tag})")
        previous = -1
        for send, recv in zip(sends, recvs, strict=True):
            _check_sizes(program, (source, send), (target, recv))
            pairs.append(_Pair((source, send), (target, recv), previous))
            previous = len(pairs) - 1
    return pairs


def _check_sizes(program: Program, source: tuple[int, int], target: tuple[int, int]) -> None:
    sent = _chunk(program, *source).count
    wanted = _chunk(program, *target).count
    if sent != wanted:
        message = f"rank {target[0]} expects {wanted} elements in step {target[1]}, {sent} are sent"
        raise fail(*source, message)


def _chunk(program: Program, rank: int, index: int) -> Chunk:
    step = program.ranks[rank].steps[index]
    assert isinstance(step, Message)
    return step.chunk


def _longest_chain(program: Program, pairs: list[_Pair]) -> int:
    """Messages on the longest chain. Raises ProofError if the graph has a cycle.

    A message is one node of the graph, and so is every step without one. In the chain a message
    waits for what its send depends on and for the one before it on its lane; that its receiver may
    still be busy does not count.
    """
    nodes, ends = _nodes(program, pairs)
    followers: list[list[int]] = [[] for _ in ends]
    waits = [0] * len(ends)

    def add(before: int, after: int) -> None:
        followers[before].append(after)
        waits[after] += 1

    for here in program.ranks:
        own = nodes[here.rank]
        for index, step in enumerate(here.steps):
            for before in step.after:
                add(own[before], own[index])
    for number, pair in enumerate(pairs):
        if pair.previous >= 0:
            add(pair.previous, number)

    depth = [[0] * len(here.steps) for here in program.ranks]
    ready = deque(node for node, count in enumerate(waits) if not count)
    num_done = 0
    while ready:
        node = ready.popleft()
        num_done += 1
        for rank, index in ends[node]:
            after = program.ranks[rank].steps[index].after
            depth[rank][index] = max((depth[rank][before] for before in after), default=0)
        if node < len(pairs):
            _deepen(depth, pairs, node)
        for follower in followers[node]:
            waits[follower] -= 1
            if not waits[follower]:
                ready.append(follower)
    if num_done < len(ends):
        stuck = next(node for node, count in enumerate(waits) if count)
        raise fail(*ends[stuck][0], "deadlock without buffers: it waits for itself")
    return max((max(steps, default=0) for steps in depth), default=0)


def _nodes(
    program: Program, pairs: list[_Pair]
) -> tuple[list[list[int]], list[tuple[tuple[int, int], ...]]]:
    """The node of each step, and the steps of each node; those of messages come first."""
    nodes = [[-1] * len(here.steps) for here in program.ranks]
    ends: list[tuple[tuple[int, int], ...]] = []
    for number, pair in enumerate(pairs):
        ends.append((pair.source, pair.target))
        for rank, index in ends[-1]:
            nodes[rank][index] = number
    for rank, own in enumerate(nodes):
        for index, number in enumerate(own):
            if number < 0:
                own[index] = len(ends)
                ends.append(((rank, index),))
    return nodes, ends


def _deepen(depth: list[list[int]], pairs: list[_Pair], number: int) -> None:
    """A send starts one step after the one before on its lane, and its message takes a step."""
    (source, send), (target, recv), previous = pairs[number]
    if previous >= 0:
        rank, index = pairs[previous].source
        depth[source][send] = max(depth[source][send], depth[rank][index] + 1)
    depth[target][recv] = max(depth[target][recv], depth[source][send] + 1)


class _Symbols:
    """The run on symbols: lists in order, sends that do not wait."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._task = program.task
        self._memory = [_initial(program.task, here) for here in program.ranks]
        self._mail: dict[tuple[int, int, int], deque[list[_Run]]] = {}
        self._next = [0] * len(program.ranks)
        self._heard: list[list[int]] = [[] for _ in program.ranks]
        self._knowledge: dict[tuple[int, int, int], deque[int]] = {}

    def run(self) -> bool:
        """Run to the end and compare; whether all sums are in order. Raises ProofError."""
        waiting = deque(range(len(self._program.ranks)))
        queued = set(waiting)
        while waiting:
            rank = waiting.popleft()
            queued.discard(rank)
            for peer in self._advance(rank):
                if peer not in queued:
                    queued.add(peer)
                    waiting.append(peer)
        for here, index in zip(self._program.ranks, self._next, strict=True):
            if index < len(here.steps):
                raise fail(here.rank, index, "deadlock in list order: its message never comes")
        return self._compare()

    def _advance(self, rank: int) -> set[int]:
        """Run a rank until it must wait; the ranks that it sent something to."""
        here, called = self._program.ranks[rank], set()
        while self._next[rank] < len(here.steps):
            index = self._next[rank]
            step = here.steps[index]
            if isinstance(step, Recv | RecvReduce) and not self._mail.get(
                (step.peer, rank, step.tag)
            ):
                break
            self._do(here, index, step)
            self._next[rank] += 1
            if isinstance(step, Send):
                called.add(step.peer)
        return called

    def _do(self, here: RankProgram, index: int, step: Step) -> None:
        rank, known = here.rank, 1 << here.rank
        for before in step.after:
            known |= self._heard[rank][before]
        if isinstance(step, Send):
            lane = (rank, step.peer, step.tag)
            self._mail.setdefault(lane, deque()).append(list(self._read(rank, step.chunk)))
            self._knowledge.setdefault(lane, deque()).append(known)
        elif isinstance(step, Message):
            lane = (step.peer, rank, step.tag)
            runs, target = self._mail[lane].popleft(), step.chunk
            known |= self._knowledge[lane].popleft()
            self._write(here, index, target, runs, is_new=isinstance(step, Recv))
        else:
            runs = list(self._read(rank, step.source))
            self._write(here, index, step.target, runs, is_new=isinstance(step, Copy))
        self._heard[rank].append(known)

    def _read(self, rank: int, chunk: Chunk) -> Iterator[_Run]:
        memory = self._memory[rank][chunk.buffer]
        for bounds in chunk.ranges:
            for start, stop, held in memory.read(*bounds):
                yield _Run(stop - start, held.ranks, start + held.shift, held.is_ordered)

    def _write(
        self, here: RankProgram, index: int, chunk: Chunk, runs: list[_Run], *, is_new: bool
    ) -> None:
        memory = self._memory[here.rank][chunk.buffer]
        is_wide = here.buffer(chunk.buffer).is_wide
        for start, stop, run in _aligned(chunk, runs):
            new = _Sum(run.ranks, run.origin - start, run.is_ordered)
            if is_new:
                memory.write(start, stop, new)
                continue
            for a, b, held in list(memory.read(start, stop)):
                message = _refusal(held, new)
                if message:
                    raise fail(here.rank, index, message)
                ranks = held.ranks | new.ranks
                is_ordered = is_wide and held.is_ordered and new.ranks == held.ranks + 1
                memory.write(a, b, _Sum(ranks, new.shift, is_ordered))

    def _compare(self) -> bool:
        if self._task.op == "barrier":
            self._compare_barrier()
            return False
        are_ordered = self._task.is_reducing
        for here in self._program.ranks:
            for buffer, bounds, wanted in _expected(self._task, here.rank):
                if bounds[0] == bounds[1]:
                    continue  # and there may be no such buffer
                for start, stop, held in self._memory[here.rank][buffer].read(*bounds):
                    if held[:2] != wanted:
                        place = f"rank {here.rank}: {buffer}[{start}:{stop}]"
                        raise ProofError(
                            f"{place} ends with {_words(held)}, not {_words(_Sum(*wanted, False))}"
                        )
                    are_ordered &= held.is_ordered
        return are_ordered

    def _compare_barrier(self) -> None:
        everyone = (1 << self._task.ranks) - 1
        for rank, heard in enumerate(self._heard):
            known = 1 << rank
            for ranks in heard:
                known |= ranks
            if known != everyone:
                missing = _lowest(everyone & ~known)
                raise ProofError(f"rank {rank} may leave before rank {missing} has entered")


def _aligned(chunk: Chunk, runs: list[_Run]) -> Iterator[tuple[int, int, _Run]]:
    """The runs of a message laid over the ranges of a chunk: start, stop, and what comes there."""
    pending = iter(runs)
    run = next(pending)
    for start, stop in chunk.ranges:
        while start < stop:
            count = min(run.length, stop - start)
            yield start, start + count, run
            start += count
            if count == run.length:
                run = next(pending, run)
            else:
                run = run._replace(length=run.length - count, origin=run.origin + count)


def _refusal(held: _Sum, new: _Sum) -> str | None:
    """Why two sums must not be added."""
    if not held.ranks or not new.ranks:
        return "it reduces elements that hold nothing"
    if held.ranks & new.ranks:
        return f"the contribution of rank {_lowest(held.ranks & new.ranks)} comes in twice"
    if held.shift != new.shift:
        return "it adds elements of different numbers"
    return None


def _initial(task: Task, here: RankProgram) -> dict[str, Segments[_Sum]]:
    """What the buffers hold before: the caller's own contributions, else nothing."""
    nothing, own = _Sum(0, 0, False), _Sum(1 << here.rank, 0, here.rank == 0)
    memory = {buffer.name: Segments(buffer.count, nothing) for buffer in here.buffers}
    if task.op == "barrier":
        return memory
    name = "input" if task.op == "all_to_all" else "data"
    start, stop = 0, memory[name].count if name in memory else 0
    if task.op == "all_gather":
        start, stop = task.block(here.rank)
    has_some = task.op not in ("broadcast", "send_recv") or here.rank == task.root
    if has_some and start < stop:
        memory[name].write(start, stop, own)
    return memory


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


def _words(held: _Sum) -> str:
    if not held.ranks:
        return "nothing"
    ranks = [str(rank) for rank in range(held.ranks.bit_length()) if held.ranks >> rank & 1]
    shown = ", ".join(ranks[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"the sum of ranks {shown}"


def _lowest(ranks: int) -> int:
    return (ranks & -ranks).bit_length() - 1

"""The language: a program is, for each rank, its buffers and a list of steps.

The package's docstring says what the words mean to whoever runs a program.
"""

from dataclasses import dataclass
from typing import TypeAlias

from tokenmill.collectives.ranges import Ranges, size
from tokenmill.collectives.task import Task
from tokenmill.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a task is done: an algorithm of the catalog and its parameters.

    `slices` cuts the work into so many parts that follow one another through the algorithm. `hosts`
    is the number of hosts, each with ranks/hosts ranks; where it matters (hierarchical, leader,
    torus) place i is on host i // (ranks/hosts). `width` is the length of a torus' rows (0: ranks
    of a host, or the most square shape). `order` lists the rank at each place of the algorithm's
    own numbering (empty: as they are numbered).
    """

    algorithm: str
    slices: int = 1
    hosts: int = 1
    width: int = 0
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("slices", 1), ("hosts", 1), ("width", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}, but must be at least {least}")


@dataclass(frozen=True, slots=True)
class Buffer:
    """A buffer of one rank, `count` elements long; a wide one holds accumulators."""

    name: str
    count: int
    is_wide: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """Ranges of a buffer, packed one after the other. Neither empty nor overlapping."""

    buffer: str
    ranges: Ranges

    @property
    def count(self) -> int:
        """Elements."""
        return size(self.ranges)


@dataclass(frozen=True, slots=True)
class Send:
    chunk: Chunk
    peer: int
    tag: int = 0
    after: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Recv:
    """chunk := the message."""

    chunk: Chunk
    peer: int
    tag: int = 0
    after: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RecvReduce:
    """chunk := chunk op the message."""

    chunk: Chunk
    peer: int
    tag: int = 0
    after: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Copy:
    """target := source."""

    source: Chunk
    target: Chunk
    after: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Reduce:
    """target := target op source."""

    source: Chunk
    target: Chunk
    after: tuple[int, ...] = ()


Step: TypeAlias = Send | Recv | RecvReduce | Copy | Reduce
Message: TypeAlias = Send | Recv | RecvReduce


@dataclass(frozen=True, slots=True)
class Lane:
    """Messages that keep their order: `sends` or receives, to or from `peer`, under `tag`."""

    is_send: bool
    peer: int
    tag: int
    steps: tuple[int, ...]
    """Indices of the steps, in order."""


@dataclass(frozen=True, slots=True)
class RankProgram:
    """What one rank has and does."""

    rank: int
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]

    def buffer(self, name: str) -> Buffer:
        """The buffer of that name; KeyError if there is none."""
        for buffer in self.buffers:
            if buffer.name == name:
                return buffer
        raise KeyError(name)

    def lanes(self) -> tuple[Lane, ...]:
        """The lanes that begin or end here, in order of first use."""
        found: dict[tuple[bool, int, int], list[int]] = {}
        for index, step in enumerate(self.steps):
            if isinstance(step, Message):
                key = isinstance(step, Send), step.peer, step.tag
                found.setdefault(key, []).append(index)
        return tuple(Lane(*key, tuple(steps)) for key, steps in found.items())


@dataclass(frozen=True, slots=True)
class Program:
    """The lists of all ranks, in order of rank."""

    task: Task
    plan: Plan
    ranks: tuple[RankProgram, ...]

"""What is to be done: the task of a collective, checked when it is made."""

from dataclasses import dataclass
from functools import cached_property

from tokenmill.collectives.ranges import Range, offsets, part
from tokenmill.errors import UsageError

OPS = (
    *("all_reduce", "reduce", "broadcast", "all_gather"),
    *("reduce_scatter", "all_to_all", "send_recv", "barrier"),
)
REDUCING_OPS = ("all_reduce", "reduce", "reduce_scatter")
BLOCK_OPS = ("all_gather", "reduce_scatter")
"""Operations in which rank r owns block r of the vector."""
ROOTED_OPS = ("reduce", "broadcast", "send_recv")


@dataclass(frozen=True, kw_only=True)
class Task:
    """An operation over `ranks` ranks and `count` elements.

    `count` is that of the full vector: what every rank holds after all-reduce or all-gather, and
    before reduce-scatter; of all-to-all, what each rank sends, its own block included (a barrier
    has none). `root` is the source of a broadcast or of send/recv, the target of a reduce; `peer`
    the target of send/recv. `counts` are the sizes of the blocks where they are not nearly equal:
    `ranks` of them; for all-to-all ranks x ranks, row by row, where entry (i, j) is what i sends to
    j (a rank's list of steps depends on its own row and column alone).

    Raises UsageError.
    """

    op: str
    ranks: int
    count: int = 0
    root: int = 0
    peer: int = 0
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise UsageError(f"no collective '{self.op}': give one of {', '.join(OPS)}")
        if self.ranks < 1:
            raise UsageError(f"{self.op} over {self.ranks} ranks: there must be at least 1")
        if self.count < 0:
            raise UsageError(f"{self.op} of {self.count} elements: there cannot be fewer than 0")
        for name in ("root", "peer"):
            rank = getattr(self, name)
            if not 0 <= rank < self.ranks:
                raise UsageError(
                    f"{self.op}: {name} is {rank}, but ranks are 0 to {self.ranks - 1}"
                )
        if self.op == "barrier" and self.count:
            raise UsageError(f"a barrier has no elements, but {self.count} were given")
        if self.op == "send_recv" and self.root == self.peer:
            raise UsageError(f"send_recv: rank {self.root} cannot send to itself")
        if self.counts:
            self._check_counts()

    def _check_counts(self) -> None:
        sizes = {"all_to_all": self.ranks**2, **dict.fromkeys(BLOCK_OPS, self.ranks)}
        wanted = sizes.get(self.op)
        if wanted is None:
            raise UsageError(f"{self.op} takes no sizes of blocks")
        if len(self.counts) != wanted:
            raise UsageError(f"{self.op}: {len(self.counts)} sizes of blocks, not {wanted}")
        if min(self.counts) < 0:
            raise UsageError(f"{self.op}: a block has {min(self.counts)} elements")
        if self.op in BLOCK_OPS and sum(self.counts) != self.count:
            raise UsageError(
                f"{self.op}: blocks of {sum(self.counts)} elements in a vector of {self.count}"
            )

    @property
    def is_reducing(self) -> bool:
        return self.op in REDUCING_OPS

    def block(self, rank: int) -> Range:
        """The elements that rank owns."""
        return self.blocks[rank] if self.counts else part((0, self.count), self.ranks, rank)

    @cached_property
    def blocks(self) -> tuple[Range, ...]:
        """The block of every rank."""
        if self.counts and self.op != "all_to_all":
            return offsets(self.counts)
        return tuple(part((0, self.count), self.ranks, rank) for rank in range(self.ranks))

    def sent(self, source: int, target: int) -> int:
        """Elements that all-to-all moves from one rank to another."""
        if self.counts:
            return self.counts[source * self.ranks + target]
        start, stop = part((0, self.count), self.ranks, target)
        return stop - start

    def sent_ranges(self, rank: int) -> tuple[Range, ...]:
        """All-to-all: where in `input` of rank the block for each rank lies."""
        return offsets([self.sent(rank, target) for target in range(self.ranks)])

    def received_ranges(self, rank: int) -> tuple[Range, ...]:
        """All-to-all: where in `output` of rank the block of each rank lies."""
        return offsets([self.sent(source, rank) for source in range(self.ranks)])

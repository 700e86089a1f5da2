"""Which tokens of which sequences make up the next step: plain Python over plain data.

There is no prefill phase and no decode phase. A sequence has tokens that are known and
positions that are computed, and each step lets the second chase the first within a budget of
tokens. A long prompt in chunks, a single next token, and recomputation after preemption are
all the same arithmetic. A sequence samples in the step in which it catches up.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tokenmill.backends.base import StepLimits
from tokenmill.engine.outputs import FinishReason
from tokenmill.engine.sequence import NO_SLOT, Sequence
from tokenmill.kv.block_pool import BlockPool, blocks_for


class Chunk(NamedTuple):
    """Positions [start, start + length) of a sequence, computed in one step."""

    sequence: Sequence
    start: int
    length: int
    first_new_block: int  # entries of the block table from here on are new; 0: all of them
    is_sampled: bool  # it reaches the end of what is known


@dataclass(frozen=True)
class Step:
    """A plan: the chunks of one step, in the order in which their tokens lie."""

    chunks: list[Chunk]

    @cached_property
    def sampled(self) -> list[Sequence]:
        """The sequences that get a token, in the order of the step's rows."""
        return [chunk.sequence for chunk in self.chunks if chunk.is_sampled]


class Scheduler:
    """First come, first served, under the limits of a compiled model.

    `running` and after it `waiting` hold all unfinished sequences in order of arrival: sequences
    are admitted from the front of `waiting`, and when a block is missing the youngest running
    one returns there. So the oldest always gets on, and every sequence ends.

    Blocks and slots that are given up can be handed out again at once, even while a step that
    uses them is in flight: steps run one after the other, so the new owner writes its positions
    after that step has ended and before it reads them.
    """

    def __init__(self, limits: StepLimits) -> None:
        self.pool = BlockPool(limits.blocks)
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.num_preemptions = 0
        self._max_step_tokens = limits.tokens
        self._num_slots = min(limits.slots, limits.sequences, limits.rows)
        self._free_slots = list(reversed(range(self._num_slots)))

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind all others."""
        self.waiting.append(sequence)

    def schedule(self) -> Step | None:
        """Plan the next step, as if the tokens in flight were known; None: nothing to compute."""
        chunks: list[Chunk] = []
        budget = self._max_step_tokens
        num_preemptions = self.num_preemptions
        for sequence in self._oldest_first():
            length = min(sequence.num_pending, budget)
            num_blocks = len(sequence.blocks)
            if length and self._grow(sequence, length):
                chunks.append(self._take(sequence, length, num_blocks))
                budget -= length
        # Whoever was preempted in this call stays out of the step: its token may be in flight.
        while budget and num_preemptions == self.num_preemptions and self._admit_next():
            sequence = self.running[-1]
            length = min(sequence.num_pending, budget)
            chunks.append(self._take(sequence, length, 0))
            budget -= length
        return Step(chunks) if chunks else None

    def commit(self, step: Step, tokens: Iterable[int]) -> list[Sequence]:
        """Append what a step sampled, one token a row; returns the sequences that got one.

        A sequence that had ended when the step was already on its way drops its token.
        """
        advanced = []
        for sequence, token in zip(step.sampled, tokens, strict=True):
            sequence.num_in_flight -= 1
            if sequence.finish_reason is not None:
                continue
            sequence.append(token)
            advanced.append(sequence)
            if sequence.finish_reason is not None:
                self._remove(sequence)
        return advanced

    def finish(
        self, sequence: Sequence, reason: FinishReason, stop_reason: str | None = None
    ) -> None:
        """End a sequence for a reason that its tokens do not show."""
        if sequence.finish_reason is None:
            self._remove(sequence)
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason

    def check(self) -> None:
        """Prove that blocks, slots and sequences agree. Raises AssertionError."""
        self.pool.check(sequence.blocks for sequence in self.running)
        slots = [sequence.slot for sequence in self.running]
        assert sorted(slots + self._free_slots) == list(range(self._num_slots)), slots
        for sequence in self.running:
            assert sequence.finish_reason is None
            assert 0 <= sequence.num_computed <= sequence.num_known
            assert len(sequence.blocks) >= blocks_for(sequence.num_computed)
        for sequence in self.waiting:
            assert sequence.finish_reason is None
            assert (sequence.num_computed, sequence.slot, sequence.blocks) == (0, NO_SLOT, [])

    def _oldest_first(self) -> Iterator[Sequence]:
        """The running sequences, while preemption takes away from the end of the list."""
        index = 0
        while index < len(self.running):
            yield self.running[index]
            index += 1

    def _take(self, sequence: Sequence, length: int, first_new_block: int) -> Chunk:
        """Count the next `length` positions as computed."""
        start = sequence.num_computed
        sequence.num_computed += length
        is_sampled = sequence.num_computed == sequence.num_known
        sequence.num_in_flight += is_sampled
        return Chunk(sequence, start, length, first_new_block, is_sampled)

    def _grow(self, sequence: Sequence, length: int) -> bool:
        """Extend the block table for `length` more positions, at the cost of the youngest.

        False: the sequence was itself the youngest, and waits now.
        """
        num_missing = blocks_for(sequence.num_computed + length) - len(sequence.blocks)
        while num_missing > self.pool.num_free:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        if num_missing > 0:
            sequence.blocks += self.pool.allocate(num_missing)
        return True

    def _admit_next(self) -> bool:
        """Let the first waiting sequence run, if all it knows fits into the pool.

        One block for each running sequence stays free, so that admission does not lead straight
        to preemption.
        """
        if not self.waiting or not self._free_slots:
            return False
        sequence = self.waiting[0]
        assert sequence.num_in_flight == 0
        num_blocks = blocks_for(sequence.num_known)
        if num_blocks + len(self.running) > self.pool.num_free:
            return False
        self.waiting.popleft()
        sequence.blocks = self.pool.allocate(num_blocks)
        sequence.slot = self._free_slots.pop()
        self.running.append(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back; what it computed is lost, its tokens are not."""
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _remove(self, sequence: Sequence) -> None:
        if sequence.slot == NO_SLOT:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.free(reversed(sequence.blocks))
        self._free_slots.append(sequence.slot)
        sequence.blocks, sequence.slot, sequence.num_computed = [], NO_SLOT, 0

"""Which tokens of which sequences make up the next step: plain Python over plain data.

There is no prefill phase and no decode phase. A sequence has tokens that are known and
positions that are computed, and each step lets the second chase the first within a budget of
tokens. A long prompt in chunks, a prompt whose beginning is in the cache, a single next token,
guesses at several of them, and recomputation after preemption are all the same arithmetic. A
sequence samples in the step in which it catches up.

Sequences that have caught up go on first. Of what is left of the budget, half goes to prompts in
order of arrival and half to the shortest, so that neither a long prompt nor a stream of short
ones keeps anybody waiting for ever.
"""

import time
from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from tokenmill.backends.base import (
    BLOCK_SIZE,
    MAX_WINDOW_DRAFTS,
    Logprobs,
    StepLimits,
    StepOutput,
)
from tokenmill.engine.adapter_slots import AdapterSlots
from tokenmill.engine.logprobs import row_logprobs
from tokenmill.engine.outputs import FinishReason
from tokenmill.engine.prefixes import Prefixes, Start
from tokenmill.engine.sequence import NO_SLOT, Sequence
from tokenmill.engine.stats import Counters
from tokenmill.engine.step import Chunk, Step, commit_states
from tokenmill.ir.low_rank import NO_ADAPTER
from tokenmill.kv.block_pool import BlockPool, blocks_for
from tokenmill.kv.window_blocks import WindowBlocks, WindowTable

_by_rank = attrgetter("rank")


@dataclass
class _Plan:
    """What a step may still take, and what it takes so far."""

    num_tokens: int
    num_rows: int
    num_draft_rows: int = 0
    lengths: dict[Sequence, int] = field(default_factory=dict)
    copies: list[tuple[int, int]] = field(default_factory=list)
    window_copies: list[tuple[int, int]] = field(default_factory=list)
    is_closed: bool = False  # nobody else is admitted
    needs_slot: bool = False  # somebody waits for an adapter's slot, so nobody else takes one

    def grant(self, sequence: Sequence, length: int) -> None:
        self.lengths[sequence] = self.lengths.get(sequence, 0) + length
        self.num_tokens -= length


class Scheduler:
    """Priorities, then first come, first served, under the limits of a compiled model.

    `running` and `waiting` are in order of rank. When a block is missing, the last running sequence
    returns to `waiting`. So the first of all always gets on, and every sequence ends.

    Blocks and slots that are given up can be handed out again at once, even while a step that
    uses them is in flight: steps run one after the other, so the new owner writes its positions
    after that step has ended and before it reads them. For the same reason a block may be copied
    that its owner has given up since.
    """

    def __init__(self, limits: StepLimits, *, has_prefix_cache: bool = True) -> None:
        self.pool = BlockPool(limits.blocks)
        self.windows = (
            WindowBlocks(limits.window, limits.window_blocks) if limits.window_blocks else None
        )
        self.adapters = AdapterSlots(limits.adapter_slots)
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.counters = Counters()
        self._is_encoder = limits.is_encoder
        self._has_prefix_cache = has_prefix_cache and not limits.is_encoder
        self._prefixes = Prefixes(self.pool, self.windows, has_cache=self._has_prefix_cache)
        self._max_drafts = limits.tokens if self.windows is None else MAX_WINDOW_DRAFTS
        self._max_step_tokens = limits.tokens
        self._max_step_rows = limits.rows
        self._num_slots = min(limits.slots, limits.sequences, limits.rows)
        self._free_slots = list(reversed(range(self._num_slots)))
        self._num_arrived = 0

    @property
    def max_running(self) -> int:
        """Sequences that can run at the same time, if the KV cache has room for them."""
        return self._num_slots

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind all others of its priority."""
        sequence.arrival = self._num_arrived
        self._num_arrived += 1
        insort(self.waiting, sequence, key=_by_rank)

    def schedule(self, prompt_budget: int | None = None) -> Step | None:
        """Plan the next step, as if the tokens in flight were known; None: nothing to compute.

        If sequences go on in it, prompts get `prompt_budget` tokens at most.
        """
        plan = _Plan(self._max_step_tokens, self._max_step_rows)
        num_preemptions = self.counters.num_preemptions
        self._make_way()
        plan.num_draft_rows = plan.num_rows - len(self.running)
        if not self._is_encoder:
            self._continue_running(plan)
        if prompt_budget is not None and plan.lengths:
            plan.num_tokens = min(plan.num_tokens, prompt_budget)
        # Whoever was preempted in this call stays out of the step: its token may be in flight.
        plan.is_closed = self.counters.num_preemptions != num_preemptions
        if self._is_encoder:
            self._compute_whole(plan)
        elif self._compute_prompts(plan, (plan.num_tokens + 1) // 2, _by_rank):
            self._compute_prompts(plan, plan.num_tokens, _by_size)
        chunks = [self._take(plan, *granted) for granted in plan.lengths.items()]
        chunks = [chunk for chunk in chunks if chunk.length]
        # Rows of one adapter that lie together are multiplied together.
        chunks.sort(key=lambda chunk: chunk.sequence.adapter_slot)
        step = Step(chunks, plan.copies, plan.window_copies)
        return step if step.chunks else None

    def commit(self, step: Step, output: StepOutput) -> list[Sequence]:
        """Take in what a step gave; returns the sequences that got tokens.

        A sequence that had ended when the step was already on its way drops its tokens.
        """
        tokens = [] if output.tokens is None else output.tokens.tolist()
        advanced, row, state = [], 0, 0
        for chunk in step.chunks:
            if chunk.sequence.finish_reason is None:
                self._commit_chunk(chunk, output, tokens, row)
                if commit_states(chunk, output, state) or chunk.is_sampled:
                    advanced.append(chunk.sequence)
            chunk.sequence.num_in_flight -= chunk.num_sampled
            row += chunk.num_rows
            state += chunk.num_pooled
        for sequence in advanced:
            if sequence.finish_reason is not None:
                self._remove(sequence)
        self.counters.note_step(step.num_tokens)
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
        if self.windows is not None:
            self.windows.check(sequence.windows for sequence in self.running)
        self.adapters.check((s.adapter, s.adapter_slot) for s in self.running)
        slots = [sequence.slot for sequence in self.running]
        assert sorted(slots + self._free_slots) == list(range(self._num_slots)), slots
        for queue in (self.running, self.waiting):
            assert queue == sorted(queue, key=_by_rank)
            assert all(sequence.finish_reason is None for sequence in queue)
        for sequence in self.running:
            assert 0 <= sequence.num_computed <= sequence.num_known
            assert len(sequence.blocks) >= blocks_for(sequence.num_computed)
            assert sequence.num_named * BLOCK_SIZE <= sequence.num_computed
        for sequence in self.waiting:
            assert (sequence.num_computed, sequence.slot, sequence.blocks) == (0, NO_SLOT, [])
        self._prefixes.check(self.running)

    def _make_way(self) -> None:
        """The first in line takes the place of running sequences of lower priority."""
        while self.waiting and self.running:
            first, last = self.waiting[0], self.running[-1]
            if first.priority >= last.priority or not self._prefixes.is_ready(first):
                return
            if self._fits(first, self._prefixes.start(first)):
                return
            self._preempt(last)

    def _continue_running(self, plan: _Plan) -> None:
        """The next token of whoever has caught up, and guesses behind it."""
        for sequence in self._first_to_last():
            if plan.num_tokens and sequence.num_pending == 1 and self._grow(sequence):
                self._trim_drafts(sequence, plan)
                plan.grant(sequence, 1 + len(sequence.drafts))

    def _trim_drafts(self, sequence: Sequence, plan: _Plan) -> None:
        """Keep as many guesses as take nothing from anybody, and make room for them."""
        if not sequence.drafts:
            return
        num_known = len(sequence.tokens)
        num_spare_blocks = max(0, self.pool.num_free - len(self.running))
        room = min(
            plan.num_tokens - 1,
            plan.num_draft_rows,
            sequence.length_limit - 1 - num_known,
            self._max_drafts,
            (len(sequence.blocks) + num_spare_blocks) * BLOCK_SIZE - num_known,
        )
        del sequence.drafts[max(0, room) :]
        plan.num_draft_rows -= len(sequence.drafts)
        num_missing = blocks_for(num_known + len(sequence.drafts)) - len(sequence.blocks)
        sequence.blocks += self.pool.allocate(max(0, num_missing))

    def _compute_prompts(
        self, plan: _Plan, budget: int, order: Callable[[Sequence], tuple[int, ...]]
    ) -> bool:
        """Give up to `budget` tokens to sequences that lag behind, and to those that wait.

        False: there was nobody.
        """
        if not budget:
            return False
        candidates = [s for s in self.running if s.num_pending > plan.lengths.get(s, 0)]
        if self._free_slots and not plan.is_closed:
            candidates += self.waiting
        for sequence in sorted(candidates, key=order):
            if sequence.slot == NO_SLOT and not self._admit(sequence, plan):
                continue
            length = min(budget, sequence.num_pending - plan.lengths.get(sequence, 0))
            plan.grant(sequence, length)
            budget -= length
            if not budget:
                break
        return bool(candidates)

    def _compute_whole(self, plan: _Plan) -> None:
        """Sequences of an encoder, each in one piece, in order of rank; nobody is overtaken."""
        for sequence in [*self.running, *self.waiting]:
            if sequence.num_pending > plan.num_tokens:
                return
            if sequence.slot == NO_SLOT and not self._admit(sequence, plan):
                return
            if sequence.num_pending:
                plan.grant(sequence, sequence.num_pending)

    def _take(self, plan: _Plan, sequence: Sequence, length: int) -> Chunk:
        """Count the next positions as computed: `length`, or as many as there are rows for."""
        start, drafts = sequence.num_computed, tuple(sequence.drafts)
        scored_start = max(start, sequence.num_scored)
        end = start + length
        if sequence.num_to_score > scored_start:
            end = min(end, scored_start + plan.num_rows)
        elif end == sequence.num_known and not plan.num_rows and sequence.pool is None:
            end -= 1
        first_pooled, num_pooled = sequence.pool.wanted(start, end) if sequence.pool else (0, 0)
        chunk = Chunk(
            sequence=sequence,
            start=start,
            length=end - start,
            is_sampled=end - len(drafts) == sequence.num_known and sequence.pool is None,
            drafts=drafts,
            scored_start=scored_start,
            num_scored=max(0, min(end, sequence.num_to_score) - scored_start),
            blocks=sequence.blocks,
            pooled_start=first_pooled,
            num_pooled=num_pooled,
        )
        if self.windows is not None and end > start:
            self.windows.extend(sequence.windows, end)
        plan.num_rows -= chunk.num_rows
        sequence.drafts = []
        sequence.num_computed = end
        sequence.num_scored = max(sequence.num_scored, scored_start + chunk.num_scored)
        sequence.num_in_flight += chunk.num_sampled
        if sequence.pool is not None:
            sequence.pool.num_planned = max(sequence.pool.num_planned, end)
        return chunk

    def _commit_chunk(self, chunk: Chunk, output: StepOutput, tokens: list[int], row: int) -> None:
        """`row` is the chunk's first in the step."""
        sequence = chunk.sequence
        for index in range(chunk.num_scored):
            token = sequence.tokens[chunk.scored_start + index + 1]
            num_top = sequence.params.prompt_logprobs or 0
            scores = row_logprobs(output.logprobs, row + index, token, num_top)
            sequence.prompt_logprobs.append(scores)
        if chunk.is_sampled:
            self._append(chunk, output.logprobs, tokens, row + chunk.num_scored)
        if sequence.blocks is chunk.blocks:
            end = chunk.start + chunk.length
            if self._has_prefix_cache:
                self._name_blocks(sequence, end)
            if self.windows is not None:
                self.windows.trim(sequence.windows, end - len(chunk.drafts))

    def _append(self, chunk: Chunk, logprobs: Logprobs | None, tokens: list[int], row: int) -> None:
        """Append what was sampled as long as it is what had been guessed, and one token more."""
        sequence, num_taken = chunk.sequence, 0
        for guess in (*chunk.drafts, None):
            token = tokens[row + num_taken]
            if sequence.params.logprobs is not None:
                num_top = sequence.params.logprobs
                sequence.logprobs.append(row_logprobs(logprobs, row + num_taken, token, num_top))
            sequence.append(token)
            num_taken += 1
            if token != guess or sequence.finish_reason is not None:
                break
        self.counters.generation_tokens += num_taken
        if chunk.drafts:
            sequence.pace.note(num_taken - 1, len(sequence.tokens), sequence.draft_cost)
            self.counters.draft_tokens += len(chunk.drafts)
            self.counters.accepted_tokens += num_taken - 1
            if sequence.blocks is chunk.blocks:
                # What the wrong guesses wrote is overwritten by what comes instead of them.
                sequence.num_computed -= 1 + len(chunk.drafts) - num_taken

    def _name_blocks(self, sequence: Sequence, end: int) -> None:
        """Make the blocks findable that are full up to position `end`, as far as it is certain."""
        num_full = min(end, len(sequence.tokens) - 1) // BLOCK_SIZE
        if num_full <= sequence.num_named:
            return
        names = sequence.names()
        for index in range(sequence.num_named, num_full):
            self.pool.name(sequence.blocks[index], names[index])
            if self.windows is not None:
                self.windows.name(sequence.windows, index, names[index])
            self._prefixes.note_named(names[index])
        sequence.num_named = num_full

    def _first_to_last(self) -> Iterator[Sequence]:
        """The running sequences, while preemption takes away from the end of the list."""
        index = 0
        while index < len(self.running):
            yield self.running[index]
            index += 1

    def _grow(self, sequence: Sequence) -> bool:
        """Extend the block table for one more position, at the cost of the last in line.

        False: the sequence was itself the last, and waits now.
        """
        if blocks_for(sequence.num_computed + 1) <= len(sequence.blocks):
            return True
        while not self.pool.num_free:
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        sequence.blocks += self.pool.allocate(1)
        return True

    def _fits(self, sequence: Sequence, start: Start) -> bool:
        """Is there a slot, and a place for all that the sequence knows?

        One block for each running sequence stays free, so that admission does not lead straight
        to preemption.
        """
        num_new = blocks_for(len(sequence.tokens)) - len(start.shared)
        num_free = self.pool.num_free - self.pool.num_unused(start.shared)
        has_slots = bool(self._free_slots) and self.adapters.fits(sequence.adapter)
        return has_slots and num_new + len(self.running) <= num_free

    def _admit(self, sequence: Sequence, plan: _Plan) -> bool:
        """Let a waiting sequence run, if it can. If space is missing, nobody overtakes it."""
        if plan.is_closed or sequence.num_in_flight or not self._prefixes.is_ready(sequence):
            return False
        # Who waits for a slot is overtaken only by those who take none.
        plan.needs_slot |= not self.adapters.fits(sequence.adapter)
        if plan.needs_slot and sequence.adapter is not None:
            return False
        start = self._prefixes.start(sequence)
        if not self._fits(sequence, start):
            plan.is_closed = True
            return False
        self.waiting.remove(sequence)
        num_new = blocks_for(len(sequence.tokens)) - len(start.shared)
        self.pool.share(start.shared)
        if start.copied is not None:
            self.pool.touch(start.copied)
        sequence.blocks = start.shared + self.pool.allocate(num_new)
        sequence.num_computed = start.num_computed
        sequence.num_named = len(start.shared)
        sequence.slot = self._free_slots.pop()
        sequence.adapter_slot = self.adapters.take(sequence.adapter)
        insort(self.running, sequence, key=_by_rank)
        # The block to copy may itself have been handed out, at its own place or at another.
        target = sequence.blocks[len(start.shared)]
        if start.copied is not None and start.copied != target:
            plan.copies.append((start.copied, target))
        self._admit_windows(sequence, start, plan)
        self._note_admission(sequence)
        return True

    def _admit_windows(self, sequence: Sequence, start: Start, plan: _Plan) -> None:
        """The same for layers with a window, whose pool is large enough for all who run."""
        if self.windows is None:
            return
        sequence.windows = self.windows.adopt(start.window_shared)
        if start.window_copied is not None:
            self.windows.pool.touch(start.window_copied)
            self.windows.extend(sequence.windows, start.num_computed)
            target = sequence.windows.blocks[-1]
            if start.window_copied != target:
                plan.window_copies.append((start.window_copied, target))

    def _note_admission(self, sequence: Sequence) -> None:
        self._prefixes.expect(sequence)
        if sequence.num_cached is not None:
            return
        sequence.admitted_s = time.perf_counter()
        sequence.num_cached = sequence.num_computed
        if sequence.parent is None:
            self.counters.prompt_tokens += sequence.prompt_len
            if self._has_prefix_cache:
                self.counters.prefix_cache_queries += sequence.prompt_len
                self.counters.prefix_cache_hits += sequence.num_computed

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back; what it computed may be lost, its tokens are not."""
        self.running.remove(sequence)
        self._release(sequence)
        insort(self.waiting, sequence, key=_by_rank)
        self.counters.num_preemptions += 1

    def _remove(self, sequence: Sequence) -> None:
        if sequence.slot == NO_SLOT:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._prefixes.forget(sequence)
        self.pool.free(reversed(sequence.blocks))
        if self.windows is not None:
            self.windows.release(sequence.windows)
            sequence.windows = WindowTable()
        self._free_slots.append(sequence.slot)
        self.adapters.give(sequence.adapter_slot)
        sequence.adapter_slot = NO_ADAPTER
        sequence.blocks, sequence.slot, sequence.num_computed = [], NO_SLOT, 0
        sequence.drafts, sequence.num_named = [], 0


def _by_size(sequence: Sequence) -> tuple[int, ...]:
    """Priority first, then what is left to compute, then arrival."""
    return (sequence.priority, sequence.num_pending, sequence.arrival)

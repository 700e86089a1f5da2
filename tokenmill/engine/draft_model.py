"""A small model that guesses what a large one will say.

It is a compiled model like any other, with a KV cache and a block pool of its own. Each sequence
has a shadow here, which runs ahead of it. The shadow samples with the sequence's parameters and
random numbers, so that the two models draw alike where they think alike.
"""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

from tokenmill.backends.base import CompiledModel, StepLimits
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.step import Chunk, Step
from tokenmill.engine.step_input import StepBuilder
from tokenmill.errors import UsageError
from tokenmill.kv.block_pool import BlockPool, blocks_for


@dataclass(eq=False, slots=True)
class _Shadow:
    """A copy of a sequence: `num_known` of its tokens are the sequence's, the others guesses."""

    ahead: Sequence
    num_known: int = 0

    @property
    def num_drafts(self) -> int:
        return len(self.ahead.tokens) - self.num_known

    def follow(self, tokens: list[int]) -> None:
        """Take over what the sequence has said, and take back the guesses that were wrong."""
        ahead = self.ahead
        right = self.num_known
        while right < min(len(tokens), len(ahead.tokens)) and ahead.tokens[right] == tokens[right]:
            right += 1
        ahead.tokens[right:] = tokens[right:]
        ahead.num_computed = min(ahead.num_computed, right)
        self.num_known = len(tokens)


class DraftModel:
    """Guesses with a compiled model, which it owns; see Drafter."""

    def __init__(self, compiled: CompiledModel, target: StepLimits) -> None:
        """Raises UsageError where the two models do not have the same tokens."""
        limits = compiled.limits
        if limits.vocab_size != target.vocab_size:
            raise UsageError(
                f"the draft model has {limits.vocab_size} tokens and the model "
                f"{target.vocab_size}: speculative must name a model with the same tokenizer"
            )
        self._compiled = compiled
        self._limits = limits
        self._builder = StepBuilder(limits)
        self._pool = BlockPool(limits.blocks)
        num_slots = min(limits.slots, limits.sequences, limits.rows, limits.tokens)
        self._free_slots = list(range(num_slots))
        self._shadows: dict[Sequence, _Shadow] = {}

    def draft(self, wanted: SequenceOf[tuple[Sequence, int]]) -> None:
        """Guess for all at once; who is far behind, or finds no room, has no guesses yet."""
        counts: dict[_Shadow, int] = {}
        for sequence, count in wanted:
            shadow = self._shadow(sequence)
            if shadow is not None:
                shadow.follow(sequence.tokens)
                counts[shadow] = count
        self._catch_up(counts)
        ready = [shadow for shadow in counts if shadow.num_drafts]
        while ready:
            ready = [s for s in ready if s.num_drafts < counts[s] and self._grow(s, 1)]
            self._step([(shadow, 1) for shadow in ready])
        for sequence, _ in wanted:
            if sequence in self._shadows:
                sequence.drafts = self._shadows[sequence].ahead.tokens[len(sequence.tokens) :]

    def keep_only(self, sequences: SequenceOf[Sequence]) -> None:
        for sequence in self._shadows.keys() - set(sequences):
            self._release(sequence)

    def close(self) -> None:
        self._compiled.close()

    def check(self) -> None:
        """Prove that blocks, slots and shadows agree. Raises AssertionError."""
        ahead = [shadow.ahead for shadow in self._shadows.values()]
        self._pool.check(sequence.blocks for sequence in ahead)
        assert not {sequence.slot for sequence in ahead} & set(self._free_slots)

    def _shadow(self, sequence: Sequence) -> _Shadow | None:
        """The shadow of a sequence, if there is a slot for it."""
        if sequence not in self._shadows:
            if not self._free_slots:
                return None
            ahead = Sequence(
                prompt_len=sequence.prompt_len,
                tokens=[],
                params=replace(sequence.params, logprobs=None, prompt_logprobs=None),
                seed=sequence.seed,
                stop_token_ids=frozenset(),
                length_limit=sequence.length_limit,
                rules=sequence.rules,
                slot=self._free_slots.pop(),
            )
            self._shadows[sequence] = _Shadow(ahead)
        return self._shadows[sequence]

    def _catch_up(self, shadows: Iterable[_Shadow]) -> None:
        """Compute what is known, as far as one step goes."""
        budget = self._limits.tokens
        grants = []
        for shadow in shadows:
            length = min(budget, len(shadow.ahead.tokens) - shadow.ahead.num_computed)
            if length and self._grow(shadow, length):
                grants.append((shadow, length))
                budget -= length
        self._step(grants)

    def _step(self, grants: Iterable[tuple[_Shadow, int]]) -> None:
        """Compute so many more positions of each; who reaches the end guesses a token."""
        chunks = [_chunk(shadow.ahead, length) for shadow, length in grants]
        if not chunks:
            return
        step = Step(chunks, [])
        self._compiled.post(self._builder.build(step))
        tokens = self._compiled.wait().tokens
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.length
        if tokens is not None:
            for sequence, token in zip(step.sampled, tokens.tolist(), strict=True):
                sequence.tokens.append(token)

    def _grow(self, shadow: _Shadow, length: int) -> bool:
        """Make room for `length` more positions, if there is any."""
        ahead = shadow.ahead
        num_blocks = blocks_for(ahead.num_computed + length)
        num_missing = num_blocks - len(ahead.blocks)
        if num_blocks > self._limits.blocks_per_sequence or num_missing > self._pool.num_free:
            return False
        ahead.blocks += self._pool.allocate(max(0, num_missing))
        return True

    def _release(self, sequence: Sequence) -> None:
        ahead = self._shadows.pop(sequence).ahead
        self._pool.free(reversed(ahead.blocks))
        self._free_slots.append(ahead.slot)


def _chunk(sequence: Sequence, length: int) -> Chunk:
    return Chunk(
        sequence=sequence,
        start=sequence.num_computed,
        length=length,
        is_sampled=sequence.num_computed + length == len(sequence.tokens),
        drafts=(),
        scored_start=0,
        num_scored=0,
        blocks=sequence.blocks,
    )

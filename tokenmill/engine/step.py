"""The plan of one step, as the scheduler hands it to whoever builds and commits it."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from tokenmill.backends.base import StepOutput
from tokenmill.engine.sequence import Sequence


class Chunk(NamedTuple):
    """Positions [start, start + length) of a sequence, computed in one step.

        known tokens ............................ | drafts
        [ start ... [ scored ....) ... | sampled row(s) )

    Rows of logits are wanted at the `num_scored` positions from `scored_start` on, for the log
    probabilities of the prompt, and, if it `is_sampled`, at the last known token and each draft;
    hidden states at the `num_pooled` positions from `pooled_start` on.
    """

    sequence: Sequence
    start: int
    length: int  # drafts included
    is_sampled: bool  # it reaches the end of what is known
    drafts: tuple[int, ...]
    scored_start: int
    num_scored: int
    blocks: list[int]  # the sequence's table at the time; it has another after a preemption
    pooled_start: int = 0
    num_pooled: int = 0

    @property
    def num_sampled(self) -> int:
        return 1 + len(self.drafts) if self.is_sampled else 0

    @property
    def num_rows(self) -> int:
        return self.num_scored + self.num_sampled


@dataclass(frozen=True)
class Step:
    """The chunks of one step, in the order in which their tokens lie, and block copies before it.

    Copies are pairs (from, to), done one after another; those of layers with a window are apart.
    """

    chunks: list[Chunk]
    copies: list[tuple[int, int]]
    window_copies: list[tuple[int, int]] = field(default_factory=list)

    @cached_property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def num_next_tokens(self) -> int:
        """Those of sequences that had caught up: one each, and guesses behind it."""
        return sum(c.length for c in self.chunks if c.length == c.num_sampled)

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get tokens."""
        return [chunk.sequence for chunk in self.chunks if chunk.is_sampled]

    @property
    def needs_tokens(self) -> bool:
        """Must its tokens be seen before another step can be planned well?"""
        return any(
            chunk.drafts or (chunk.is_sampled and chunk.sequence.needs_tokens)
            for chunk in self.chunks
        )


def commit_states(chunk: Chunk, output: StepOutput, row: int) -> bool:
    """Take in the states of a chunk, `row` being its first; True: they were the last."""
    sequence = chunk.sequence
    if sequence.pool is None:
        return False
    if chunk.num_pooled:
        assert output.hidden is not None
        sequence.pool.add(output.hidden[row : row + chunk.num_pooled])
    if chunk.start + chunk.length < sequence.prompt_len:
        return False
    sequence.pooled = sequence.pool.pooled()
    sequence.finish_reason = "stop"
    return True

"""A compiled model that is no model: its next token is a hash of what the block tables show."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tokenmill.backends.base import BLOCK_SIZE, SampleInput, StepInput, StepLimits, StepOutput
from tokenmill.engine.sequence import Sequence


def make_limits(**changes: int) -> StepLimits:
    sizes = {
        "tokens": 16,
        "sequences": 4,
        "rows": 4,
        "blocks": 12,
        "blocks_per_sequence": 8,
        "slots": 4,
        "vocab_size": 1000,
    }
    return StepLimits(**{**sizes, **changes})


@dataclass(eq=False)
class FakeModel:
    """Runs the posted step only when it is waited for, so that arrays which change meanwhile show.

    The cache keeps (token, position) at each place. A row's token depends on all pairs that its
    block table leads to and on its sampling parameters, and on nothing else. Rows with wrong
    positions, or that read what was never written or is another's, therefore give other tokens.
    """

    limits: StepLimits = field(default_factory=make_limits)
    fail_at_step: int | None = None
    steps: list[StepInput] = field(default_factory=list)
    is_closed: bool = False

    def __post_init__(self) -> None:
        self._cache = np.full((self.limits.blocks, BLOCK_SIZE, 2), -1, np.int64)
        self._slots = np.full(self.limits.slots, -1, np.int64)
        self._posted: StepInput | None = None

    def post(self, step: StepInput) -> None:
        assert self._posted is None, "a step is in flight already"
        assert not self.is_closed
        self._check(step)
        self.steps.append(step)
        self._posted = step

    def wait(self) -> StepOutput:
        assert self._posted is not None, "no step is in flight"
        step, self._posted = self._posted, None
        if len(self.steps) == self.fail_at_step:
            raise FloatingPointError("the fake model fails")
        self._forward(step)
        if step.sampling is None:
            return StepOutput(tokens=None, logits=None)
        tokens = [self._sample(step, row) for row in range(len(step.rows))]
        self._slots[step.sampling.slots] = tokens
        return StepOutput(tokens=np.array(tokens, np.int32), logits=None)

    def close(self) -> None:
        assert self._posted is None, "a step is in flight"
        self.is_closed = True

    def _check(self, step: StepInput) -> None:
        limits = self.limits
        assert 0 < len(step.tokens) <= limits.tokens
        assert len(step.tokens) == len(step.positions) == len(step.sequences)
        assert step.block_tables.shape[0] <= limits.sequences
        assert step.block_tables.shape[1] == limits.blocks_per_sequence
        assert len(step.rows) <= limits.rows
        assert (np.diff(step.rows) > 0).all()
        steps = np.diff(step.sequences)
        assert step.sequences[0] == 0
        assert set(steps.tolist()) <= {0, 1}
        assert (np.diff(step.positions)[steps == 0] == 1).all()
        for array in (step.tokens, step.positions, step.sequences, step.block_tables, step.rows):
            assert array.dtype == np.int32
            assert array.flags.c_contiguous

    def _forward(self, step: StepInput) -> None:
        tokens = step.tokens.astype(np.int64)
        in_slots = tokens < 0
        tokens[in_slots] = self._slots[-tokens[in_slots] - 1]
        assert ((tokens >= 0) & (tokens < self.limits.vocab_size)).all()
        blocks = step.block_tables[step.sequences, step.positions // BLOCK_SIZE]
        places = blocks.astype(np.int64) * BLOCK_SIZE + step.positions % BLOCK_SIZE
        assert len(set(places.tolist())) == len(places), "two tokens are written to one place"
        self._cache.reshape(-1, 2)[places] = np.stack([tokens, step.positions], axis=1)

    def _sample(self, step: StepInput, row: int) -> int:
        assert step.sampling is not None
        index = step.rows[row]
        num_known = int(step.positions[index]) + 1
        assert step.sampling.positions[row] == num_known
        table = step.block_tables[step.sequences[index]]
        seen = self._cache[table].reshape(-1, 2)[:num_known]
        return next_token(seen, row_params(step.sampling, row), self.limits.vocab_size)


def row_params(sampling: SampleInput, row: int) -> tuple[object, ...]:
    """All that a row's token may depend on beside the tokens."""
    start, end = sampling.history_starts[row : row + 2]
    ids, counts = sampling.history_ids[start:end], sampling.history_counts[start:end]
    return (
        sampling.temperature[row].item(),
        sampling.top_k[row].item(),
        sampling.top_p[row].item(),
        sampling.min_p[row].item(),
        sampling.repetition_penalty[row].item(),
        sampling.frequency_penalty[row].item(),
        sampling.presence_penalty[row].item(),
        sampling.seeds[row].item() if sampling.temperature[row] else 0,  # greedy draws nothing
        sampling.positions[row].item(),
        sorted(zip(ids.tolist(), counts.tolist(), strict=True)),
    )


def next_token(seen: npt.NDArray[np.int64], params: tuple[object, ...], vocab_size: int) -> int:
    """A token from (token, position) pairs [n, 2] and sampling parameters."""
    digest = hashlib.blake2b(seen.tobytes(), digest_size=8)
    digest.update(repr(params).encode())
    return int.from_bytes(digest.digest(), "little") % vocab_size


def expected_output(sequence: Sequence, vocab_size: int = 1000) -> list[int]:
    """What the fake model says to a fresh sequence when nothing at all goes wrong."""
    tokens, params = list(sequence.tokens), sequence.params
    history = dict.fromkeys(tokens, 0)
    while len(tokens) < sequence.length_limit:
        row = (
            _f32(0 if params.is_greedy else params.temperature),
            max(params.top_k, 0),
            _f32(params.top_p),
            _f32(params.min_p),
            _f32(params.repetition_penalty),
            _f32(params.frequency_penalty),
            _f32(params.presence_penalty),
            0 if params.is_greedy else sequence.seed,
            len(tokens),
            sorted(history.items()) if params.has_penalties else [],
        )
        seen = np.stack([np.array(tokens), np.arange(len(tokens))], axis=1).astype(np.int64)
        tokens.append(next_token(seen, row, vocab_size))
        history[tokens[-1]] = history.get(tokens[-1], 0) + 1
        if tokens[-1] in sequence.stop_token_ids:
            break
    return tokens[sequence.prompt_len :]


def _f32(value: float) -> float:
    return np.float32(value).item()

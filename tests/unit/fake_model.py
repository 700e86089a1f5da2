"""A compiled model that is no model: its next token is a hash of what the block tables show."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tokenmill.backends.base import (
    BLOCK_SIZE,
    Logprobs,
    SampleInput,
    StepInput,
    StepLimits,
    StepOutput,
)
from tokenmill.engine.sequence import Sequence
from tokenmill.ir.low_rank import LowRank
from tokenmill.models.adapters import Adapter

_POSITIONS = np.arange(4096)
STATE_SIZE = 6


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

    The cache keeps (token, position) at each place, tokens changed by their adapter. A row's token
    depends on all pairs that its block table leads to and on its sampling parameters, and on
    nothing else. Rows with wrong positions, or that read what was never written or is another's,
    therefore give other tokens.
    """

    limits: StepLimits = field(default_factory=make_limits)
    fail_at_step: int | None = None
    steps: list[StepInput] = field(default_factory=list)
    is_closed: bool = False
    is_warm: bool = False
    can_pool: bool = False
    placed: dict[int, Mapping[str, LowRank]] = field(default_factory=dict)  # by slot

    def __post_init__(self) -> None:
        self._cache = np.full((self.limits.blocks, BLOCK_SIZE, 2), -1, np.int64)
        self._windows = np.full((self.limits.window_blocks, BLOCK_SIZE, 2), -1, np.int64)
        self._slots = np.full(self.limits.slots, -1, np.int64)
        self._posted: StepInput | None = None

    def warm_up(self, *, pools: bool = False) -> None:
        self.is_warm = True

    def prepare_pooling(self) -> None:
        self.can_pool = True

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
        hidden = self._hidden(step)
        if step.sampling is None:
            return StepOutput(tokens=None, logits=None, hidden=hidden)
        tokens = np.array([self._sample(step, row) for row in range(len(step.rows))], np.int32)
        kept = step.sampling.slots >= 0
        self._slots[step.sampling.slots[kept]] = tokens[kept]
        return StepOutput(
            tokens=tokens, logits=None, logprobs=self._logprobs(step, tokens), hidden=hidden
        )

    def set_adapter(self, slot: int, changes: Mapping[str, LowRank]) -> None:
        assert self._posted is None, "a step is in flight"
        assert 0 <= slot < self.limits.adapter_slots
        self.placed[slot] = changes

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
        assert (step.rows[1:] > step.rows[:-1]).all()
        steps = step.sequences[1:] - step.sequences[:-1]
        assert step.sequences[0] == 0
        assert set(steps.tolist()) <= {0, 1}
        assert ((step.positions[1:] - step.positions[:-1])[steps == 0] == 1).all()
        assert (step.window_tables is not None) == bool(limits.window_blocks)
        tables = step.block_tables if step.window_tables is None else step.window_tables
        for array in (step.tokens, step.positions, step.sequences, step.block_tables, tables):
            assert array.dtype == np.int32
            assert array.flags.c_contiguous

    def _forward(self, step: StepInput) -> None:
        for source, target in [] if step.copies is None else step.copies.tolist():
            self._cache[target] = self._cache[source]
        tokens = step.tokens.astype(np.int64)
        in_slots = tokens < 0
        tokens[in_slots] = self._slots[-tokens[in_slots] - 1]
        assert ((tokens >= 0) & (tokens < self.limits.vocab_size)).all()
        if step.adapters is not None:
            tokens += np.array([self._mark(slot) for slot in step.adapters.tolist()])
        self._write(self._cache, step.block_tables, step, tokens)
        if step.window_tables is not None:
            for source, target in [] if step.window_copies is None else step.window_copies.tolist():
                self._windows[target] = self._windows[source]
            self._write(self._windows, step.window_tables, step, tokens)

    def _write(
        self,
        cache: npt.NDArray[np.int64],
        tables: npt.NDArray[np.int32],
        step: StepInput,
        tokens: npt.NDArray[np.int64],
    ) -> None:
        blocks = tables[step.sequences, step.positions // BLOCK_SIZE]
        places = blocks.astype(np.int64) * BLOCK_SIZE + step.positions % BLOCK_SIZE
        assert len(set(places.tolist())) == len(places), "two tokens are written to one place"
        flat = cache.reshape(-1, 2)
        flat[places, 0], flat[places, 1] = tokens, step.positions

    def _mark(self, slot: int) -> int:
        return 0 if slot < 0 else mark_of(self.placed[slot])

    def _sample(self, step: StepInput, row: int) -> int:
        assert step.sampling is not None
        seen = self._seen(step, row)
        assert step.sampling.positions[row] == len(seen)
        return next_token(
            seen,
            row_params(step.sampling, row),
            self.limits.vocab_size,
            allowed=row_mask(step.sampling, row),
            biases=row_biases(step.sampling, row),
        )

    def _hidden(self, step: StepInput) -> npt.NDArray[np.float32] | None:
        """A state for each pooled token, from what the cache shows to it."""
        if step.pooled is None:
            return None
        states = []
        for index in step.pooled.tolist():
            last = int(step.positions[index])
            if self.limits.is_encoder:
                last = int(step.positions[step.sequences == step.sequences[index]].max())
            states.append(fake_state(self._seen_at(step, index, last + 1), step.positions[index]))
        return np.array(states, np.float32).reshape(len(states), STATE_SIZE)

    def _seen(self, step: StepInput, row: int) -> npt.NDArray[np.int64]:
        """What the cache shows to a row: (token, position) [n, 2]."""
        index = step.rows[row]
        return self._seen_at(step, index, int(step.positions[index]) + 1)

    def _seen_at(self, step: StepInput, index: int, length: int) -> npt.NDArray[np.int64]:
        sequence = step.sequences[index]
        seen = self._cache[step.block_tables[sequence]].reshape(-1, 2)[:length]
        if step.window_tables is not None:
            first = max(0, length - self.limits.window)
            own = self._windows[step.window_tables[sequence]].reshape(-1, 2)[first:length]
            assert np.array_equal(own, seen[first:]), "the window shows something else"
        return seen

    def _logprobs(self, step: StepInput, tokens: npt.NDArray[np.int32]) -> Logprobs | None:
        if step.logprobs is None:
            return None
        targets = np.where(step.logprobs.targets < 0, tokens, step.logprobs.targets)
        rows = [
            token_logprobs(self._seen(step, row), int(target), step.logprobs.top)
            for row, target in enumerate(targets)
        ]
        logprobs, ranks, top_ids, top = zip(*rows, strict=True)
        return Logprobs(
            targets=np.array(logprobs, np.float32),
            ranks=np.array(ranks, np.int32),
            top_ids=np.array(top_ids, np.int32),
            top=np.array(top, np.float32),
        )


def fake_state(seen: npt.NDArray[np.int64], position: int) -> npt.NDArray[np.float32]:
    """A hidden state from (token, position) pairs [n, 2] and the token's own position."""
    key = seen.tobytes() + int(position).to_bytes(4, "little")
    digest = hashlib.blake2b(key, digest_size=2 * STATE_SIZE).digest()
    return np.frombuffer(digest, np.uint16).astype(np.float32) / 7


def expected_embedding(sequence: Sequence, *, is_encoder: bool = False) -> list[float]:
    """The embedding that the fake model's states amount to when nothing at all goes wrong."""
    assert sequence.pool is not None
    tokens = sequence.tokens[: sequence.prompt_len]
    start, stop = sequence.pool.params.span(len(tokens))
    states = [
        fake_state(seen_of(tokens if is_encoder else tokens[: position + 1]), position)
        for position in range(start, stop)
    ]
    total = np.zeros(STATE_SIZE)
    for state in states:
        total = total + state
    vector = (total / len(states)).astype(np.float32)
    return (vector / np.linalg.norm(vector)).tolist()


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


def row_biases(sampling: SampleInput, row: int) -> dict[int, float]:
    if sampling.biases is None:
        return {}
    start, end = sampling.biases.starts[row : row + 2]
    ids, values = sampling.biases.ids[start:end].tolist(), sampling.biases.values[start:end]
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, values.tolist(), strict=True))


def row_mask(sampling: SampleInput, row: int) -> set[int] | None:
    if sampling.masks is None or sampling.masks.rows[row] < 0:
        return None
    words = sampling.masks.words[sampling.masks.rows[row]]
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def next_token(
    seen: npt.NDArray[np.int64],
    params: tuple[object, ...],
    vocab_size: int,
    *,
    allowed: set[int] | None = None,
    biases: Mapping[int, float] | None = None,
) -> int:
    """A token from (token, position) pairs [n, 2] and sampling parameters.

    Biases that forbid nothing count as parameters.
    """
    biases = biases or {}
    forbidden = {token for token, bias in biases.items() if bias == -math.inf}
    finite = sorted((token, bias) for token, bias in biases.items() if bias != -math.inf)
    digest = hashlib.blake2b(seen.tobytes(), digest_size=8)
    digest.update(repr((params, finite)).encode())
    number = int.from_bytes(digest.digest(), "little")
    if allowed is None and not forbidden:
        return number % vocab_size
    choices = sorted((allowed or set(range(vocab_size))) - forbidden)
    return choices[number % len(choices)]


def token_logprobs(
    seen: npt.NDArray[np.int64], token: int, num_top: int
) -> tuple[float, int, list[int], list[float]]:
    """Made-up logprob and rank of a token, and made-up likely ones with theirs."""
    digest = hashlib.blake2b(seen.tobytes(), digest_size=4).digest()
    base = int.from_bytes(digest, "little") % 997
    return -(base + token) / 100, 30 + token, list(range(num_top)), [-i / 7 for i in range(num_top)]


def expected_output(sequence: Sequence, vocab_size: int = 1000) -> list[int]:
    """What the fake model says to a fresh sequence when nothing at all goes wrong."""
    tokens, params, rules = list(sequence.tokens), sequence.params, sequence.rules
    history = dict.fromkeys(tokens, 0)
    mark = 0 if sequence.adapter is None else mark_of(sequence.adapter.changes)
    allowed = None if params.allowed_token_ids is None else set(params.allowed_token_ids)
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
        biases = dict(rules.always)
        output = tokens[sequence.prompt_len :]
        if len(output) < params.min_tokens:
            biases |= dict.fromkeys(sequence.stop_token_ids, -math.inf)
        for word in rules.bad_words:
            if output[len(output) - len(word) + 1 :] == list(word[:-1]):
                biases[word[-1]] = -math.inf
        seen = seen_of(tokens, mark)
        tokens.append(next_token(seen, row, vocab_size, allowed=allowed, biases=biases))
        history[tokens[-1]] = history.get(tokens[-1], 0) + 1
        if tokens[-1] in sequence.stop_token_ids:
            break
    return tokens[sequence.prompt_len :]


def seen_of(tokens: list[int], mark: int = 0) -> npt.NDArray[np.int64]:
    """What the cache shows where nothing at all goes wrong: (token, position) [n, 2]."""
    seen = np.empty((len(tokens), 2), np.int64)
    seen[:, 0], seen[:, 1] = tokens, _POSITIONS[: len(tokens)]
    seen[:, 0] += mark
    return seen


def make_adapter(name: str, content: str = "") -> Adapter:
    """An adapter that the fake model knows by its content."""
    digest = hashlib.sha256((content or name).encode()).digest()
    number = np.frombuffer(digest, "<f4", 1).reshape(1, 1).astype(np.float32)
    changes = {"layers.0.q": LowRank(down_RK=number, up_NR=number)}
    return Adapter(name=name, path=f"/{name}", digest=digest, rank=1, changes=changes)


def mark_of(changes: Mapping[str, LowRank]) -> int:
    [change] = changes.values()
    return int(change.down_RK.view(np.uint32)[0, 0]) << 20


def _f32(value: float) -> float:
    return np.float32(value).item()

"""The operation suite: whatever calls itself a compiled model is held against the reference.

`CHECKS` are its parts; `run_check` runs one on random cases. How far logits may be from
the reference's is measured and not guessed: the reference runs again with noise of a few last bits
on every result, and a backend may be a few times as far off as that. So the tolerance covers what
a flipped rounding does, whatever the graph makes of it. Flips are rare, so the better rows must be
far closer than the worst: they tell a rounding that is missing. (Not in a long sequence, where a
flip in an early key or value reaches every later row.)
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import numpy as np
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from tests.backend.adapters import ADAPTER_SLOTS, put_adapters, with_adapters
from tests.backend.graphs import Case, cases
from tests.backend.sampling_rows import possible_tokens, random_sampling
from tests.backend.traffic import (
    Chunk,
    Rng,
    Traffic,
    make_limits,
    make_step,
    random_steps,
    random_traffic,
    run_traffic,
    shuffled_tables,
    soil_cache,
    window_tables,
)
from tokenmill.backends.base import CompiledModel, F32Array, StepLimits
from tokenmill.backends.reference.model import ReferenceModel, sampling_rows
from tokenmill.ir.ops import OPS

MakeModel = Callable[[Case, StepLimits], CompiledModel]
Check = Callable[[MakeModel, Case, Rng], None]

QUARTILE_FLOORS = {"f32": 1e-5, "bf16": 2e-4, "int8": 2e-4}
WORST_FLOORS = {"f32": 1e-5, "bf16": 4e-3, "int8": 1e-2}
"""Relative error that is never too much: of sums in another order, or of one flipped rounding."""

NOISE = {"f32": 2.0**-22, "bf16": 2.0**-18, "int8": 2.0**-22}
"""Relative error of a result. For bf16 a dot may run on 128 + q for a 4-bit q, and take 128 times
the sum of x out again, which costs four bits."""

SLACK = 4.0
SHORT = 24  # positions


def run_check(check: Check, make_model: MakeModel, *, max_examples: int) -> None:
    """One check on random cases, the same ones in every run."""

    @settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(), seed=st.integers(0, 2**32 - 1))
    def run(case: Case, seed: int) -> None:
        note(repr(case))
        check(make_model, case, np.random.default_rng(seed))

    run()


def check_logits(make_model: MakeModel, case: Case, rng: Rng) -> None:
    """Logits are the reference's, whatever lay in the cache before."""
    limits = make_limits(case.vocab_size, window=case.window)
    model = make_model(case, limits)
    soil_cache(model, rng)
    traffic = random_traffic(rng, limits, random_lengths(rng))
    found = run_traffic(model, traffic)
    model.close()
    assert_close(case, limits, traffic, found)


def check_sampling(make_model: MakeModel, case: Case, rng: Rng) -> None:
    """A sampled token follows from the model's own logits, parameters, seed and position."""
    limits = make_limits(case.vocab_size, window=case.window)
    model = make_model(case, limits)
    traffic = random_traffic(rng, limits, (9, 5, 17))
    chunks = [Chunk(sequence=i, start=0, length=n) for i, n in enumerate((9, 5, 17))]
    slots = rng.permutation(limits.slots)[:3].astype(np.int32)
    for _ in range(4):
        positions = np.array([9, 5, 17], np.int32)
        sampling = random_sampling(rng, slots, positions, limits.vocab_size)
        model.post(make_step(traffic, chunks, sampling=sampling, are_last_rows=True))
        output = model.wait()
        assert output.logits is not None
        assert output.tokens is not None
        params = sampling_rows(sampling, limits.vocab_size)
        rows = zip(output.logits, params, output.tokens, strict=True)
        assert all(token in possible_tokens(logits, row) for logits, row, token in rows)
    model.close()


def check_slots(make_model: MakeModel, case: Case, rng: Rng) -> None:
    """A token that was sampled into a slot is the next step's input, without Python's help."""
    limits = make_limits(case.vocab_size, window=case.window)
    model = make_model(case, limits)
    traffic = random_traffic(rng, limits, (4, 7))
    prompts = [Chunk(sequence=0, start=0, length=3), Chunk(sequence=1, start=0, length=6)]
    slots, positions = np.array([3, 1], np.int32), np.array([3, 6], np.int32)
    sampling = random_sampling(rng, slots, positions, limits.vocab_size)
    model.post(make_step(traffic, prompts, sampling=sampling, are_last_rows=True))
    sampled = model.wait().tokens
    assert sampled is not None
    step = make_step(traffic, [Chunk(sequence=i, start=n, length=1) for i, n in enumerate((3, 6))])
    logits = []
    for tokens in (-slots - 1, sampled.copy()):
        model.post(replace(step, tokens=tokens))
        logits.append(model.wait().logits)
    model.close()
    assert logits[0] is not None
    assert logits[1] is not None
    assert np.array_equal(logits[0], logits[1])


def check_forward_only(make_model: MakeModel, case: Case, rng: Rng) -> None:
    """A step of which nothing is wanted gives nothing, and fills the cache all the same."""
    limits = make_limits(case.vocab_size, window=case.window)
    model = make_model(case, limits)
    traffic = random_traffic(rng, limits, (20,))
    prompt, last = Chunk(sequence=0, start=0, length=19), Chunk(sequence=0, start=19, length=1)
    step = make_step(traffic, [prompt])
    model.post(replace(step, rows=np.empty(0, np.int32), want_logits=False))
    output = model.wait()
    assert output.tokens is None
    assert output.logits is None
    found = run_traffic(model, replace(traffic, steps=((last,),)))
    model.close()
    assert_close(case, limits, replace(traffic, steps=((prompt,), (last,))), found)


CHECKS: tuple[Check, ...] = (check_logits, check_sampling, check_slots, check_forward_only)


def check_same_bits(make_model: MakeModel, case: Case, rng: Rng) -> None:
    """A sequence's logits do not change with its company, its chunks or its blocks."""
    limits = make_limits(case.vocab_size, window=case.window)
    lengths = random_lengths(rng)
    traffic = random_traffic(rng, limits, lengths)
    alone = replace(
        traffic, sequences=traffic.sequences[:1], steps=random_steps(rng, lengths[:1], 64)
    )
    other = replace(
        traffic,
        tables=shuffled_tables(rng, limits, lengths),
        window_tables=window_tables(rng, limits, lengths),
        steps=random_steps(rng, lengths, limits.tokens),
    )
    model = make_model(case, limits)
    expected = run_traffic(model, traffic)
    for changed in (alone, other):
        soil_cache(model, rng)
        found = run_traffic(model, changed)
        assert all(map(np.array_equal, found, expected))
    model.close()


def random_lengths(rng: Rng) -> tuple[int, ...]:
    """One to four sequences; one in six is longer than a chunk of attention."""
    lengths = rng.integers(1, SHORT + 1, rng.integers(1, 5)).tolist()
    if rng.random() < 1 / 6:
        lengths[0] = int(rng.integers(250, 290))
    return tuple(lengths)


def check_adapters(make_model: MakeModel, case: Case, rng: Rng) -> None:
    """Sequences with different adapters, and with none, in one step.

    Who has one gets the reference's logits, in whichever slot it lies; who has none, the bits of
    the model without adapters.
    """
    adapted = with_adapters(case, rng)
    lengths = random_lengths(rng)
    plain = make_limits(case.vocab_size, window=case.window)
    limits = replace(plain, adapter_slots=ADAPTER_SLOTS)
    traffic = random_traffic(rng, limits, lengths)
    model = make_model(case, plain)
    without = run_traffic(model, traffic)
    model.close()
    chosen = rng.integers(-1, len(adapted.adapters), len(lengths)).astype(np.int32)
    model = make_model(adapted, limits)
    for slots in (np.arange(ADAPTER_SLOTS), rng.permutation(ADAPTER_SLOTS)):
        put_adapters(model, adapted, slots)
        placed = np.where(chosen < 0, chosen, slots[chosen]).astype(np.int32)
        found = run_traffic(model, replace(traffic, adapters=placed))
        for index in np.flatnonzero(chosen < 0):
            assert found[index].tobytes() == without[index].tobytes()
        assert_close(adapted, limits, replace(traffic, adapters=chosen), found)
    model.close()


@dataclass(frozen=True, kw_only=True, eq=False)
class Expected:
    """The reference's logits for some traffic, and the errors that noise makes of them."""

    logits: list[F32Array]
    disturbed: list[F32Array]


_EXPECTED: dict[str, Expected] = {}
"""By all that it depends on: every backend gets the same cases, and the reference is slow."""


def expected_of(case: Case, limits: StepLimits, traffic: Traffic) -> Expected:
    key = _digest(case, limits, traffic)
    if key not in _EXPECTED:
        _EXPECTED[key] = _expect(case, limits, traffic)
    return _EXPECTED[key]


def _digest(case: Case, limits: StepLimits, traffic: Traffic) -> str:
    digest = hashlib.sha256(repr((case, limits, traffic.steps)).encode())
    for adapter in case.adapters:
        for name, change in adapter.items():
            digest.update(name.encode() + change.down_RK.tobytes() + change.up_NR.tobytes())
    digest.update(repr(traffic.adapters).encode())
    for name, weight in case.weights.items():
        digest.update(f"{name} {weight.format}".encode() + weight.dequantize().tobytes())
    for array in (*traffic.sequences, traffic.tables):
        digest.update(f"{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _expect(case: Case, limits: StepLimits, traffic: Traffic) -> Expected:
    def run() -> list[F32Array]:
        model = ReferenceModel(case.numeric, case.weights, limits=limits)
        put_adapters(model, case, np.arange(limits.adapter_slots))
        return run_traffic(model, traffic)

    logits = run()
    disturbed = []
    for seed in range(3):
        with noise(np.random.default_rng(seed), NOISE[case.activations]):
            disturbed.append(row_errors(run(), logits))
    return Expected(logits=logits, disturbed=disturbed)


def assert_close(
    case: Case, limits: StepLimits, traffic: Traffic, found: Sequence[F32Array]
) -> None:
    """Logits of each sequence (or of its last positions) are as near as noise lets them be."""
    expected = expected_of(case, limits, traffic)
    errors, disturbed = row_errors(found, expected.logits), expected.disturbed
    kinds = (case.activations, case.cache)
    allowed = max(max(WORST_FLOORS[k] for k in kinds), SLACK * max(e.max() for e in disturbed))
    assert errors.max() <= allowed, f"error {errors.max():.1e}, noise explains {allowed:.1e}"
    if len(errors) >= 16 and max(map(len, found)) <= SHORT:
        noisy = max(np.quantile(e, 0.25) for e in disturbed)
        allowed = max(max(QUARTILE_FLOORS[k] for k in kinds), SLACK * noisy)
        quartile = np.quantile(errors, 0.25)
        assert quartile <= allowed, f"a row's error {quartile:.1e}, noise explains {allowed:.1e}"


def row_errors(found: Sequence[F32Array], expected: Sequence[F32Array]) -> F32Array:
    """The relative error of each row that was found, by norm."""
    pairs = [(f, e[-len(f) :]) for f, e in zip(found, expected, strict=True)]
    errors = [np.linalg.norm(f - e, axis=1) / np.linalg.norm(e, axis=1) for f, e in pairs]
    return np.concatenate(errors)


@contextmanager
def noise(rng: Rng, size: float) -> Iterator[None]:
    """Give every result that the reference computes an error of a few last bits."""

    def noisy(compute: Callable[..., F32Array], *operands: object, **attrs: object) -> F32Array:
        result = compute(*operands, **attrs)
        scale = np.float32(size) * np.sqrt(np.square(result).mean(axis=-1, keepdims=True))
        return result + scale * rng.standard_normal(result.shape, np.float32)

    names = (
        *("rmsnorm", "head_norm", "linear", "rope", "attention", "silu", "gelu", "softcap"),
        *("expert_linear", "combine", "gelu_erf", "layer_norm", "shrink", "expand"),
    )
    rows = {n: replace(OPS[n], reference=partial(noisy, OPS[n].reference)) for n in names}
    with patch.dict(OPS, rows):
        yield

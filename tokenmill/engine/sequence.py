"""One sequence of tokens on its way through the engine."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from tokenmill.backends.base import BLOCK_SIZE, StepLimits
from tokenmill.engine.outputs import FinishReason
from tokenmill.errors import CapacityError, UsageError
from tokenmill.sampling.params import SamplingParams

NO_SLOT = -1


@dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
    """A prompt, the tokens that followed it, and how far the model has computed it.

        tokens    [ prompt ........ | output ..... ]( in flight )
        computed  [ ..................... )

    A token is in flight when a step that was planned will sample it, but the engine has not yet
    seen it: it sits in the native slot, and the next step can already read it from there.
    """

    prompt_len: int
    tokens: list[int]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    length_limit: int  # tokens of prompt and output at which it ends

    slot: int = NO_SLOT  # native slot, while it runs
    blocks: list[int] = field(default_factory=list)  # block table, while it runs
    num_computed: int = 0  # positions whose keys and values some planned step writes
    num_in_flight: int = 0
    history: dict[int, int] | None = None  # token id -> count in the output, where penalised
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def __post_init__(self) -> None:
        if self.params.has_penalties:
            self.history = dict.fromkeys(self.tokens, 0)

    @property
    def num_known(self) -> int:
        """Tokens that a next step could read, those in flight included."""
        return len(self.tokens) + self.num_in_flight

    @property
    def num_pending(self) -> int:
        """Tokens that a next step could compute.

        The last token of all is never computed: nothing follows it. Penalties need the ids of all
        tokens, so a penalised sequence waits for the one in flight.
        """
        if self.history is not None and self.num_in_flight:
            return 0
        return min(self.num_known, self.length_limit - 1) - self.num_computed

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    def append(self, token: int) -> None:
        """Take a sampled token, and finish where it says so."""
        self.tokens.append(token)
        if self.history is not None:
            self.history[token] = self.history.get(token, 0) + 1
        if token in self.stop_token_ids:
            self.finish_reason = "stop"
            self.stop_reason = token if token in self.params.stop_token_ids else None
        elif len(self.tokens) == self.length_limit:
            self.finish_reason = "length"


def make_sequence(
    name: str,
    prompt: SequenceOf[int],
    params: SamplingParams,
    *,
    seed: int,
    eos_ids: SequenceOf[int],
    limits: StepLimits,
    max_model_len: int,
) -> Sequence:
    """A sequence that the engine can serve, alone at the least.

    Raises UsageError or CapacityError, which begin with `name`, where it could never run.
    """
    _check_prompt(name, prompt, limits.vocab_size)
    end_ids = () if params.ignore_eos else eos_ids
    return Sequence(
        prompt_len=len(prompt),
        tokens=list(prompt),
        params=params,
        seed=seed,
        stop_token_ids=frozenset((*end_ids, *params.stop_token_ids)),
        length_limit=_length_limit(name, len(prompt), params.max_tokens, limits, max_model_len),
    )


def _check_prompt(name: str, prompt: SequenceOf[int], vocab_size: int) -> None:
    if not prompt:
        raise UsageError(f"{name} is empty: give at least one token")
    for index, token in enumerate(prompt):
        if isinstance(token, bool) or not isinstance(token, int):
            raise UsageError(f"{name} holds {token!r} at index {index}, which is not a token id")
        if not 0 <= token < vocab_size:
            raise UsageError(
                f"{name} holds token id {token} at index {index}: "
                f"ids of this model run from 0 to {vocab_size - 1}"
            )


def _length_limit(
    name: str, prompt_len: int, max_tokens: int | None, limits: StepLimits, max_model_len: int
) -> int:
    context = min(max_model_len, limits.blocks_per_sequence * BLOCK_SIZE)
    if prompt_len + 1 > context:
        raise UsageError(
            f"{name} has {prompt_len} tokens, but a context of {context} leaves room for "
            f"{context - 1}: shorten the prompt or raise max_model_len"
        )
    pool = limits.blocks * BLOCK_SIZE
    if prompt_len + 1 > pool:
        raise CapacityError(
            f"{name} has {prompt_len} tokens, but the KV cache of {pool} leaves room for "
            f"{pool - 1}: shorten the prompt or raise kv_cache_memory_bytes"
        )
    # The last token needs no place in the cache.
    longest = min(context, pool + 1)
    return longest if max_tokens is None else min(longest, prompt_len + max_tokens)

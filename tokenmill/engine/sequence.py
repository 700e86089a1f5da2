"""One sequence of tokens on its way through the engine."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokenmill.backends.base import BLOCK_SIZE, F32Array, StepLimits
from tokenmill.engine.outputs import FinishReason, TokenLogprobs
from tokenmill.engine.pooling import Pool, check_length
from tokenmill.errors import CapacityError, UsageError
from tokenmill.ir.low_rank import NO_ADAPTER
from tokenmill.kv.block_hash import extend_names, root_name
from tokenmill.kv.window_blocks import WindowTable
from tokenmill.sampling.logit_rules import NO_RULES, LogitRules, make_rules
from tokenmill.sampling.pace import Pace
from tokenmill.sampling.params import SamplingParams
from tokenmill.sampling.pooling import PoolingParams

if TYPE_CHECKING:
    from tokenmill.models.adapters import Adapter

NO_SLOT = -1
_NOT_SAMPLED = SamplingParams(temperature=0.0, max_tokens=1)


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
    rules: LogitRules = NO_RULES
    priority: int = 0  # the lower, the sooner
    root: bytes = field(default_factory=lambda: root_name(""))
    adapter: "Adapter | None" = None
    parent: "Sequence | None" = None  # computes the same prompt, to share it
    pool: Pool | None = None  # its prompt is pooled, and nothing sampled

    arrival: int = -1  # the scheduler counts
    slot: int = NO_SLOT  # native slot, while it runs
    adapter_slot: int = NO_ADAPTER  # where its adapter lies, while it runs
    blocks: list[int] = field(default_factory=list)  # block table, while it runs
    windows: WindowTable = field(default_factory=WindowTable)  # of layers with a window
    block_names: list[bytes] = field(default_factory=list)  # of the full blocks
    num_named: int = 0  # blocks that the pool knows by their names
    num_computed: int = 0  # positions whose keys and values some planned step writes
    num_in_flight: int = 0
    num_scored: int = 0  # prompt positions whose log probabilities some planned step gives
    num_cached: int | None = None  # prompt tokens found in the cache when it first ran
    admitted_s: float | None = None  # time.perf_counter when it first ran
    drafts: list[int] = field(default_factory=list)  # guesses at the next tokens
    pace: Pace = field(default_factory=Pace)
    draft_cost: float = 0.0  # tokens that a step with guesses must gain to pay
    is_speculating: bool = False
    history: dict[int, int] | None = None  # token id -> count in the output, where penalised
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    pooled: F32Array | None = None  # what `pool` made of it, once it has finished
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def __post_init__(self) -> None:
        if self.params.has_penalties:
            self.history = dict.fromkeys(self.tokens, 0)

    def sibling(self, seed: int) -> "Sequence":
        """Another sample of the prompt, which it shares with this one; none of them has run."""
        return Sequence(
            prompt_len=self.prompt_len,
            tokens=self.tokens.copy(),
            params=self.params,
            seed=seed,
            stop_token_ids=self.stop_token_ids,
            length_limit=self.length_limit,
            rules=self.rules,
            priority=self.priority,
            root=self.root,
            adapter=self.adapter,
            parent=self,
        )

    @property
    def rank(self) -> tuple[int, int]:
        """Its place in line: priority first, then arrival."""
        return (self.priority, self.arrival)

    @property
    def num_known(self) -> int:
        """Tokens that a next step could read, those in flight included."""
        return len(self.tokens) + self.num_in_flight

    @property
    def needs_tokens(self) -> bool:
        """Must the engine have seen every token before it can plan the next?"""
        return self.history is not None or self.is_speculating or self.rules.needs_tokens

    @property
    def num_pending(self) -> int:
        """Tokens that a next step could compute, guesses not counted.

        The last token of all is never computed: nothing follows it.
        """
        if self.num_in_flight and self.needs_tokens:
            return 0
        return min(self.num_known, self.length_limit - 1) - self.num_computed

    @property
    def num_to_score(self) -> int:
        """Prompt positions whose log probabilities are wanted: each tells of the next token."""
        return 0 if self.params.prompt_logprobs is None else self.prompt_len - 1

    @property
    def num_reusable(self) -> int:
        """Positions that need not be computed where they are in the cache.

        Those behind are computed for what they give; the last one always is.
        """
        num_reusable = len(self.tokens) - 1
        if self.num_to_score > self.num_scored:
            num_reusable = min(num_reusable, self.num_scored)
        if self.pool is not None and (wanted := self.pool.next_wanted) is not None:
            num_reusable = min(num_reusable, wanted)
        return num_reusable

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

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

    def names(self) -> list[bytes]:
        """The names of all blocks that its tokens fill."""
        extend_names(self.block_names, self.root, self.tokens)
        return self.block_names


def make_sequence(
    name: str,
    prompt: SequenceOf[int],
    params: SamplingParams,
    *,
    seed: int,
    eos_ids: SequenceOf[int],
    limits: StepLimits,
    max_model_len: int,
    longest_model_len: int | None = None,
    bad_words: SequenceOf[SequenceOf[int]] = (),
    priority: int = 0,
    cache_salt: str = "",
    adapter: "Adapter | None" = None,
    parent: Sequence | None = None,
) -> Sequence:
    """A sequence that the engine can serve, alone at the least; `bad_words` are token ids.

    `longest_model_len` is what max_model_len could be at most; None: what it is.

    Raises UsageError or CapacityError, which begin with `name` or with a field of `params`, where
    it could never run.
    """
    # The length first: a prompt that is far too long costs nothing more.
    longest = longest_model_len or max_model_len
    length_limit = _length_limit(
        name, len(prompt), params.max_tokens, limits, max_model_len, longest
    )
    _check_prompt(name, prompt, limits.vocab_size)
    _check_params(params, limits)
    end_ids = () if params.ignore_eos else eos_ids
    stop_token_ids = frozenset((*end_ids, *params.stop_token_ids))
    return Sequence(
        prompt_len=len(prompt),
        tokens=list(prompt),
        params=params,
        seed=seed,
        stop_token_ids=stop_token_ids,
        length_limit=length_limit,
        rules=make_rules(
            logit_bias=params.logit_bias,
            allowed_token_ids=params.allowed_token_ids,
            bad_words=bad_words,
            min_tokens=params.min_tokens,
            end_ids=stop_token_ids,
            vocab_size=limits.vocab_size,
        ),
        priority=priority,
        root=root_name(cache_salt, adapter.digest if adapter else b""),
        adapter=adapter,
        parent=parent,
    )


def make_pooled_sequence(
    name: str,
    prompt: SequenceOf[int],
    params: PoolingParams,
    *,
    limits: StepLimits,
    max_model_len: int,
    second_start: int | None = None,
    priority: int = 0,
    adapter: "Adapter | None" = None,
) -> Sequence:
    """A sequence of which an embedding is wanted.

    Raises UsageError or CapacityError, which begin with `name`, where it could never run.
    """
    check_length(name, prompt, limits, max_model_len)
    _check_prompt(name, prompt, limits.vocab_size)
    return Sequence(
        prompt_len=len(prompt),
        tokens=list(prompt),
        params=_NOT_SAMPLED,
        seed=0,
        stop_token_ids=frozenset(),
        length_limit=len(prompt) + 1,
        priority=priority,
        root=root_name("", adapter.digest if adapter else b""),
        adapter=adapter,
        pool=Pool(params=params, span=params.span(len(prompt)), second_start=second_start),
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


def _check_params(params: SamplingParams, limits: StepLimits) -> None:
    """What only the model can tell of the parameters."""
    for field_name, ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("logit_bias", params.logit_bias or ()),
    ):
        outside = [token for token in ids if token >= limits.vocab_size]
        if outside:
            raise UsageError(
                f"{field_name} holds token id {outside[0]}, but ids of this model run from 0 to "
                f"{limits.vocab_size - 1}"
            )
    for field_name, wanted in (
        ("logprobs", params.logprobs),
        ("prompt_logprobs", params.prompt_logprobs),
    ):
        if wanted is not None and wanted > min(limits.logprobs, limits.vocab_size):
            raise UsageError(
                f"{field_name} is {wanted}, but this model reports at most "
                f"{min(limits.logprobs, limits.vocab_size)}"
            )


def longest_prompt(limits: StepLimits, max_model_len: int) -> int:
    """Tokens of the longest prompt that leaves room for one more."""
    return min(_context(limits, max_model_len), limits.blocks * BLOCK_SIZE) - 1


def _context(limits: StepLimits, max_model_len: int) -> int:
    return min(max_model_len, limits.blocks_per_sequence * BLOCK_SIZE)


def _way_out(limits: StepLimits, max_model_len: int, longest_model_len: int) -> str:
    """What else than a shorter prompt would help."""
    if limits.blocks_per_sequence * BLOCK_SIZE < max_model_len:
        return " or raise kv_cache_memory_bytes"
    if max_model_len < longest_model_len:
        return f" or raise max_model_len, up to {longest_model_len}"
    return ": the model was made for no more"


def _length_limit(
    name: str,
    prompt_len: int,
    max_tokens: int | None,
    limits: StepLimits,
    max_model_len: int,
    longest_model_len: int,
) -> int:
    context = _context(limits, max_model_len)
    if prompt_len + 1 > context:
        raise UsageError(
            f"{name} has {prompt_len} tokens, but a context of {context} leaves room for "
            f"{context - 1}: shorten the prompt{_way_out(limits, max_model_len, longest_model_len)}"
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

"""What an engine tells about itself: frozen snapshots that any thread may take."""

from bisect import bisect_left
from dataclasses import dataclass, field

STEP_TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds of the buckets in which steps are counted by their tokens."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """`counts[i]` values are at most `bounds[i]` and above the bound before; the last has none."""

    bounds: tuple[int, ...]
    counts: tuple[int, ...]  # one more than bounds
    total: int  # sum of the values


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """An engine at a moment; the counters count since its start.

    `prefix_cache_queries` and `prefix_cache_hits` count prompt tokens: those looked for in the
    prefix cache, and those found there. `prompt_tokens` counts the prompts of requests that got
    their first step, cached or not.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_used_blocks: int
    num_cached_blocks: int  # free blocks that a prompt could still find its beginning in
    num_steps: int
    num_preemptions: int
    num_evictions: int  # blocks whose content was given up for another
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    draft_tokens: int
    accepted_tokens: int
    step_tokens: Histogram
    max_loras: int  # adapters that one step may use; 0: the model takes none
    running_loras: tuple[str, ...]  # names of those that running sequences have
    waiting_loras: tuple[str, ...]

    @property
    def kv_cache_usage(self) -> float:
        """The part of the KV cache that is in use, from 0 to 1."""
        return self.num_used_blocks / self.num_blocks


@dataclass(frozen=True, slots=True)
class BlockMap:
    """The KV pool, block by block: `states` holds FREE, CACHED or USED for each.

    A cached block is free too, but a prompt may still find its beginning there.
    """

    FREE = 0
    CACHED = 1
    USED = 2

    states: bytes
    references: tuple[int, ...]  # block tables that hold the block
    num_evictions: int
    last_evicted: tuple[int, ...]  # the latest of them, by their blocks, the last at the end


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """Is the engine alive? `idle_s` is the time since a step ended or since work came."""

    is_alive: bool
    is_paused: bool
    has_work: bool
    idle_s: float


@dataclass(slots=True)
class Counters:
    """What the step loop counts as it goes."""

    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    step_tokens_sum: int = 0
    step_tokens: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKEN_BOUNDS) + 1))

    def note_step(self, num_tokens: int) -> None:
        self.num_steps += 1
        self.step_tokens_sum += num_tokens
        self.step_tokens[bisect_left(STEP_TOKEN_BOUNDS, num_tokens)] += 1

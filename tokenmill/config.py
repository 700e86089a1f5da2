"""The configuration of an engine, checked once and then frozen."""

from dataclasses import dataclass

from tokenmill.errors import UsageError

CHEAP_ROWS = 8
"""Rows of one step up to which a row more costs little: reading the weights takes the time."""

QUANTIZATIONS = (
    "auto",
    "q4_0",
    "q4_z",
    "q4_k",
    "q4",
    "q5_k",
    "q6_k",
    "q8_z",
    "q8",
    "f8",
    "bf16",
    "f32",
)
ACTIVATIONS = ("bf16", "int8", "f32")
KV_CACHES = ("auto", "bf16", "f32", "int8")
POOLINGS = ("auto", "last", "mean", "cls", "max", "mean_sqrt_len", "weightedmean")
MAX_THREADS = 1024
MAX_LORAS = 1024
MAX_LORA_RANK = 1024

_ADAPTERS_IN_MEMORY = 16


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a model is loaded and served; the names are those of the command line's flags.

    `None` and "auto" leave the choice to the loader, which knows the model and the machine.
    Raises UsageError where a value is outside its range.
    """

    model: str = "smollm2"
    quantization: str = "auto"
    activations: str = "bf16"
    kv_cache: str = "auto"
    threads: int | None = None
    max_model_len: int | None = None  # tokens of prompt and output together
    max_num_seqs: int = 64  # sequences that run at the same time
    max_num_batched_tokens: int = 512  # tokens in one step
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    target_itl_ms: float | None = None  # gap between tokens up to which prompts may stretch steps
    speculative: str = "off"  # "off", "ngram", or a draft model with the same tokenizer
    num_speculative_tokens: int = 4  # guesses for one sequence in one step, at most
    max_waiting: int | None = None  # requests that wait before another is refused
    pooling: str = "auto"  # how embeddings are made: a name in POOLINGS
    normalize: bool | None = None  # bring embeddings to length 1
    enable_lora: bool = False
    max_loras: int = 1  # adapters that one step may use
    max_cpu_loras: int | None = None  # adapters that lie in memory; others are read when needed
    max_lora_rank: int = 16
    offline: bool = False

    def __post_init__(self) -> None:
        if not self.model:
            raise UsageError("model is empty: give an alias, hf:org/repo, a folder or a .gguf file")
        _check_choice("quantization", self.quantization, QUANTIZATIONS)
        _check_choice("activations", self.activations, ACTIVATIONS)
        _check_choice("pooling", self.pooling, POOLINGS)
        _check_choice("kv_cache", self.kv_cache, KV_CACHES)
        _check_count("threads", self.threads, least=1, most=MAX_THREADS)
        _check_count("max_model_len", self.max_model_len, least=2)
        _check_count("max_num_seqs", self.max_num_seqs, least=1)
        _check_count("max_num_batched_tokens", self.max_num_batched_tokens, least=1)
        _check_count("kv_cache_memory_bytes", self.kv_cache_memory_bytes, least=1)
        _check_count("num_speculative_tokens", self.num_speculative_tokens, least=1)
        if self.target_itl_ms is not None and not self.target_itl_ms > 0:
            raise UsageError(f"target_itl_ms is {self.target_itl_ms!r}, but must be above 0")
        if not self.speculative:
            raise UsageError("speculative is empty: give off, ngram or the name of a draft model")
        _check_count("max_waiting", self.max_waiting, least=0)
        _check_count("max_loras", self.max_loras, least=1, most=MAX_LORAS)
        _check_count("max_cpu_loras", self.max_cpu_loras, least=self.max_loras)
        _check_count("max_lora_rank", self.max_lora_rank, least=1, most=MAX_LORA_RANK)

    @property
    def adapters_in_memory(self) -> int:
        """`max_cpu_loras`, or a number that seldom makes anybody wait for the disk."""
        return self.max_cpu_loras or max(_ADAPTERS_IN_MEMORY, self.max_loras)

    @property
    def max_step_rows(self) -> int:
        """Rows of logits in a step: one a sequence, and guesses behind it while few run."""
        return max(self.max_num_seqs, CHEAP_ROWS)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r}, but must be one of {', '.join(choices)}")


def _check_count(name: str, value: int | None, *, least: int, most: int | None = None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} is {value!r}, but must be a whole number of at least {least}")
    if most is not None and value > most:
        raise UsageError(f"{name} is {value}, but must be at most {most}")

"""Arguments that several commands share, and what is made of them."""

from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tokenmill.config import ACTIVATIONS, KV_CACHES, POOLINGS, QUANTIZATIONS, EngineConfig
from tokenmill.models.sources.aliases import DEFAULT_MODEL

if TYPE_CHECKING:
    from tokenmill.engine.adapters import LoRARequest

SAMPLING_FALLBACK: Mapping[str, object] = {"max_tokens": 512, "temperature": 0.7, "top_p": 0.95}
"""What holds where neither a flag nor the model's generation_config.json says anything."""

_ENGINE_FIELDS = (
    *("model", "quantization", "activations", "kv_cache"),
    *("threads", "max_model_len", "speculative", "num_speculative_tokens", "offline"),
    *("pooling", "normalize"),
)
_SCHEDULING_FIELDS = (
    *("max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes"),
    "enable_prefix_caching",
)
_SAMPLING_FIELDS = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"),
)


def add_model_argument(parser: ArgumentParser) -> None:
    """`--model`."""
    parser.add_argument(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        help="an alias (see `tokenmill models`), hf:org/repo, modelscope:org/repo, pypi:package, a "
        "folder or a .gguf file (default: %(default)s)",
    )


def add_engine_arguments(parser: ArgumentParser) -> None:
    """What `make_engine_config` takes."""
    add_model_argument(parser)
    group = parser.add_argument_group("engine")
    for flag, choices, default, what in (
        ("--quantization", QUANTIZATIONS, "auto", "weights in memory"),
        ("--activations", ACTIVATIONS, "bf16", "activations"),
        ("--kv-cache", KV_CACHES, "auto", "keys and values"),
    ):
        group.add_argument(
            flag,
            default=default,
            choices=choices,
            help=f"format of the {what} (default: %(default)s)",
        )
    group.add_argument(
        "--threads", type=int, metavar="N", help="workers (default: what the machine allows)"
    )
    group.add_argument(
        "--max-model-len", type=int, metavar="N", help="tokens of prompt and answer together"
    )
    group.add_argument(
        "--speculative",
        metavar="WHAT",
        default="off",
        help="guess tokens ahead: off, ngram (from the text itself), or a small model with the "
        "same tokenizer; what is said stays the same (default: %(default)s)",
    )
    group.add_argument(
        "--num-speculative-tokens",
        type=int,
        metavar="N",
        default=EngineConfig().num_speculative_tokens,
        help="guesses for a sequence in one step, at most (default: %(default)s)",
    )
    group.add_argument(
        "--pooling",
        choices=POOLINGS,
        default="auto",
        help="what embeddings are made of: the last token, the mean of all, the first (cls), the "
        "greatest of all, their sum over the root of the length, or a mean in which later tokens "
        "count more; auto: as the model's files say, else the first of an encoder and the last of "
        "others (default: %(default)s)",
    )
    group.add_argument(
        "--normalize",
        action=BooleanOptionalAction,
        help="bring embeddings to length 1 (default: as the model's files say, else yes)",
    )
    group.add_argument("--offline", action="store_true", help="do not use the network")


def add_scheduling_arguments(parser: ArgumentParser) -> None:
    """What is shared by many requests; `make_engine_config` takes it where it is given."""
    group = parser.add_argument_group("scheduling")
    defaults = EngineConfig()
    for flag, default, text in (
        ("--max-num-seqs", defaults.max_num_seqs, "sequences that run at the same time"),
        ("--max-num-batched-tokens", defaults.max_num_batched_tokens, "tokens in one step"),
    ):
        group.add_argument(
            flag, type=int, metavar="N", default=default, help=f"{text} (default: %(default)s)"
        )
    group.add_argument(
        "--kv-cache-memory-bytes",
        type=int,
        metavar="N",
        help="memory for keys and values (default: a part of what is free)",
    )
    group.add_argument(
        "--no-prefix-caching",
        action="store_false",
        dest="enable_prefix_caching",
        help="compute every prompt from its beginning",
    )


def add_lora_arguments(parser: ArgumentParser) -> None:
    """LoRA adapters for a server, which loads and unloads them while it runs."""
    group = parser.add_argument_group("LoRA adapters")
    defaults = EngineConfig()
    group.add_argument(
        "--enable-lora",
        action="store_true",
        help="requests may choose adapters by name; they are loaded with --lora-modules and at "
        "/v1/load_lora_adapter",
    )
    group.add_argument(
        "--lora-modules",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="adapters to begin with: folders that PEFT has saved",
    )
    for flag, default, text in (
        ("--max-loras", defaults.max_loras, "adapters that may be in use at the same time"),
        ("--max-lora-rank", defaults.max_lora_rank, "largest rank that an adapter may have"),
    ):
        group.add_argument(
            flag, type=int, metavar="N", default=default, help=f"{text} (default: %(default)s)"
        )
    group.add_argument(
        "--max-cpu-loras",
        type=int,
        metavar="N",
        help="adapters that are kept in memory; others are read again when they are asked for "
        f"(default: {defaults.adapters_in_memory}, or --max-loras if that is more)",
    )


def add_sampling_arguments(parser: ArgumentParser) -> None:
    """What `given_sampling` takes, and `--system`. A flag that is not given is None."""
    parser.add_argument("--system", metavar="TEXT", help="instructions before the conversation")
    group = parser.add_argument_group(
        "sampling", "What is not given is as the model's generation_config.json says, or else:"
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"end the answer after so many tokens ({SAMPLING_FALLBACK['max_tokens']})",
    )
    for flag, default, text in (
        (
            "--temperature",
            SAMPLING_FALLBACK["temperature"],
            "randomness; 0 always takes the likeliest token",
        ),
        (
            "--top-p",
            SAMPLING_FALLBACK["top_p"],
            "choose among the likeliest tokens that have this share together",
        ),
        ("--min-p", 0.0, "leave out tokens below this share of the likeliest one's chance"),
        ("--repetition-penalty", 1.0, "above 1: tokens that were there become less likely"),
    ):
        group.add_argument(flag, type=float, metavar="X", help=f"{text} ({default})")
    group.add_argument(
        "--top-k", type=int, metavar="N", help="choose among so many tokens; 0: all (0)"
    )
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")


def add_lora_argument(parser: ArgumentParser) -> None:
    """`--lora`, an adapter for all that a command says."""
    parser.add_argument(
        "--lora",
        type=Path,
        metavar="PATH",
        help="a LoRA adapter: a folder that PEFT has saved",
    )


def make_engine_config(values: dict[str, object]) -> EngineConfig:
    """The configuration in the parsed values; UsageError where one is out of range."""
    fields: dict[str, object] = {name: values[name] for name in _ENGINE_FIELDS}
    fields |= {name: values[name] for name in _SCHEDULING_FIELDS if name in values}
    if isinstance(lora := values.get("lora"), Path):
        from tokenmill.models.adapters import adapter_rank

        fields |= {"enable_lora": True, "max_lora_rank": adapter_rank(lora)}
    return EngineConfig(**fields)  # type: ignore[arg-type]  # it checks them itself


def make_lora_request(lora: object) -> "LoRARequest | None":
    """What asks for the adapter of `--lora`, where one is given."""
    from tokenmill.engine.adapters import LoRARequest

    return LoRARequest(lora.name or "lora", 1, str(lora)) if isinstance(lora, Path) else None


def given_sampling(values: dict[str, object]) -> dict[str, object]:
    """The sampling fields that were given; UsageError where one is out of range."""
    from tokenmill.sampling.params import SamplingParams

    given = {name: values[name] for name in _SAMPLING_FIELDS if values[name] is not None}
    SamplingParams.with_defaults({}, **given)
    return given

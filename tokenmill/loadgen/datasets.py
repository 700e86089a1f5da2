"""The prompts of a run: made up, from conversations, or as traces of real traffic had them."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenmill.errors import UsageError
from tokenmill.loadgen.records import LoadRequest
from tokenmill.loadgen.traces import TraceLine, read_azure, read_mooncake
from tokenmill.loadgen.vocabulary import Vocabulary
from tokenmill.models.text.tokenizer import Tokenizer

DATASETS = ("random", "sharegpt", "azure", "mooncake")
DEFAULT_PROMPTS = 1000
MOONCAKE_BLOCK = 512
"""Tokens that a hash id of the Mooncake traces stands for."""
_SHAREGPT_LEAST = 4
_SHAREGPT_LONGEST_PROMPT = 1024
_SHAREGPT_LONGEST = 2048


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """What to send. Lengths are in tokens; those of a trace are divided by `length_divisor`.

    `num_prompts` None: 1,000, or all that a trace has in its first `trace_seconds`.
    Raises UsageError where values make no sense.
    """

    name: str = "random"
    path: Path | None = None
    num_prompts: int | None = None
    seed: int = 0
    input_len: int = 1024
    output_len: int | None = None  # None: 128 if random, what the dataset has if not
    range_ratio: float = 0.0
    prefix_len: int = 0  # shared by all random prompts, before `input_len`
    length_divisor: int = 1
    trace_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.name not in DATASETS:
            raise UsageError(f"--dataset-name {self.name!r} is none of {', '.join(DATASETS)}")
        if (self.path is None) != (self.name == "random"):
            verb = "makes its prompts up: leave out" if self.path else "needs"
            raise UsageError(f"--dataset-name {self.name} {verb} --dataset-path")
        if not 0 <= self.range_ratio < 1:
            raise UsageError(f"--random-range-ratio is {self.range_ratio:g}, but must be in [0, 1)")
        for flag, value, least in (
            ("--num-prompts", self.num_prompts, 1),
            ("--random-input-len", self.input_len, 1),
            ("--output-len", self.output_len, 1),
            ("--random-prefix-len", self.prefix_len, 0),
            ("--length-divisor", self.length_divisor, 1),
        ):
            if value is not None and value < least:
                raise UsageError(f"{flag} is {value}, but must be at least {least}")
        if self.name == "mooncake" and MOONCAKE_BLOCK % self.length_divisor:
            raise UsageError(
                f"--length-divisor is {self.length_divisor}, but must divide the "
                f"{MOONCAKE_BLOCK} tokens of a Mooncake block"
            )


def load_dataset(
    options: DatasetOptions, vocabulary: Vocabulary, tokenizer: Tokenizer | None
) -> list[LoadRequest]:
    """The requests, the same for the same options. Raises UsageError for a bad file."""
    if options.name == "random":
        return _random(options, vocabulary)
    assert options.path is not None
    if options.name == "sharegpt":
        if tokenizer is None:
            raise UsageError("--dataset-name sharegpt needs --tokenizer, to know the lengths")
        return _sharegpt(options, options.path, tokenizer)
    read = read_azure if options.name == "azure" else read_mooncake
    lines = read(options.path, limit_s=options.trace_seconds, limit=options.num_prompts)
    shared: dict[int, list[int]] = {}
    requests = [_from_trace(line, i, options, vocabulary, shared) for i, line in enumerate(lines)]
    if not requests:
        raise UsageError(f"{options.path} holds no requests in the time that was asked for")
    return requests


def _random(options: DatasetOptions, vocabulary: Vocabulary) -> list[LoadRequest]:
    rng = random.Random(options.seed)
    prefix = vocabulary.draw(rng, options.prefix_len)
    requests = []
    for _ in range(options.num_prompts or DEFAULT_PROMPTS):
        indices = prefix + vocabulary.draw(rng, _spread(rng, options.input_len, options))
        requests.append(
            LoadRequest(
                prompt=vocabulary.prompt(indices),
                prompt_len=len(indices),
                output_len=_spread(rng, options.output_len or 128, options),
            )
        )
    return requests


def _spread(rng: random.Random, length: int, options: DatasetOptions) -> int:
    """A length within the range ratio of `length`, evenly distributed."""
    lowest, highest = length * (1 - options.range_ratio), length * (1 + options.range_ratio)
    return rng.randint(max(1, round(lowest)), max(1, round(highest)))


def _sharegpt(options: DatasetOptions, path: Path, tokenizer: Tokenizer) -> list[LoadRequest]:
    """First question and answer of each conversation, in random order, over again if too few.

    Left out, as is usual with this dataset: prompts or answers below 4 tokens, prompts above
    1,024, both together above 2,048.
    """
    count = options.num_prompts or DEFAULT_PROMPTS
    pairs = _read_sharegpt(path)
    random.Random(options.seed).shuffle(pairs)
    requests: list[LoadRequest] = []
    for question, answer in pairs:
        prompt_len = len(tokenizer.encode(question))
        output_len = options.output_len or len(tokenizer.encode(answer, add_special_tokens=False))
        if (
            min(prompt_len, output_len if options.output_len is None else prompt_len)
            >= _SHAREGPT_LEAST
            and prompt_len <= _SHAREGPT_LONGEST_PROMPT
            and prompt_len + output_len <= _SHAREGPT_LONGEST
        ):
            requests.append(
                LoadRequest(prompt=question, prompt_len=prompt_len, output_len=output_len)
            )
        if len(requests) == count:
            return requests
    if not requests:
        raise UsageError(f"{path} holds no conversation of a usable length")
    return [requests[index % len(requests)] for index in range(count)]


def _read_sharegpt(path: Path) -> list[tuple[str, str]]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, list):
        raise UsageError(f"{path} is no ShareGPT file: the document is not a list")
    pairs = [pair for entry in document if (pair := _first_turns(entry)) is not None]
    if not pairs:
        raise UsageError(f"{path} is no ShareGPT file: no entry has two turns in 'conversations'")
    return pairs


def _first_turns(entry: Any) -> tuple[str, str] | None:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    values = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
    question, answer = values
    if not isinstance(question, str) or not isinstance(answer, str):
        return None
    return question, answer


def _from_trace(
    line: TraceLine,
    index: int,
    options: DatasetOptions,
    vocabulary: Vocabulary,
    shared: dict[int, list[int]],
) -> LoadRequest:
    """Text of the line's length; where the trace has hash ids, equal ids give equal text."""
    prompt_len = max(1, line.input_len // options.length_divisor)
    block_len = MOONCAKE_BLOCK // options.length_divisor
    indices: list[int] = []
    for hash_id in line.hash_ids:
        if hash_id not in shared:
            rng = random.Random(f"{options.seed} block {hash_id}")
            shared[hash_id] = vocabulary.draw(rng, block_len)
        indices += shared[hash_id]
    rng = random.Random(f"{options.seed} request {index}")
    indices += vocabulary.draw(rng, max(0, prompt_len - len(indices)))
    return LoadRequest(
        prompt=vocabulary.prompt(indices[:prompt_len]),
        prompt_len=prompt_len,
        output_len=options.output_len or max(1, line.output_len // options.length_divisor),
        arrival_s=line.arrival_s,
    )

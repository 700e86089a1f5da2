"""Traces of real traffic: when requests came, how long they were, what they had in common.

Azure: github.com/Azure/AzurePublicDataset, AzureLLMInferenceTrace (arrival, context tokens,
generated tokens). Mooncake: github.com/kvcache-ai/Mooncake, FAST25 traces, in which each hash id
names 512 tokens together with all that comes before them.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice, takewhile
from pathlib import Path

from tokenmill.errors import UsageError

_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_Parse = Callable[[Path, Iterator[str]], "Iterator[TraceLine]"]


@dataclass(frozen=True, slots=True)
class TraceLine:
    arrival_s: float  # since the first request
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()


def read_azure(path: Path, *, limit_s: float | None, limit: int | None) -> list[TraceLine]:
    """The requests of a CSV trace, of the first `limit_s` seconds. Raises UsageError."""
    return _read(path, _azure_lines, limit_s, limit)


def read_mooncake(path: Path, *, limit_s: float | None, limit: int | None) -> list[TraceLine]:
    """The requests of a JSON-lines trace, of the first `limit_s` seconds. Raises UsageError."""
    return _read(path, _mooncake_lines, limit_s, limit)


def _read(path: Path, parse: _Parse, limit_s: float | None, limit: int | None) -> list[TraceLine]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = parse(path, file)
            if limit_s is not None:
                lines = takewhile(lambda line: line.arrival_s < limit_s, lines)
            return list(islice(lines, limit))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text file: {error.reason}") from error


def _azure_lines(path: Path, file: Iterator[str]) -> Iterator[TraceLine]:
    rows = csv.DictReader(file)
    if missing := [name for name in _AZURE_COLUMNS if name not in (rows.fieldnames or ())]:
        raise UsageError(f"{path} is no Azure trace: it has no column {', '.join(missing)}")
    first: datetime | None = None
    for row in rows:
        try:
            # Python reads six digits of a second, the files have seven.
            at = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])
            first = first or at
            lengths = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}, line {rows.line_num}: {error}") from None
        yield TraceLine((at - first).total_seconds(), *lengths)


def _mooncake_lines(path: Path, file: Iterator[str]) -> Iterator[TraceLine]:
    first_ms: float | None = None
    for number, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            entry = json.loads(text)
            at_ms = float(entry["timestamp"])
            lengths = int(entry["input_length"]), int(entry["output_length"])
            hash_ids = tuple(int(hash_id) for hash_id in entry["hash_ids"])
        except KeyError as error:
            raise UsageError(f"{path}, line {number}: no field {error}") from None
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path}, line {number}: no Mooncake request: {error}") from None
        first_ms = at_ms if first_ms is None else first_ms
        yield TraceLine((at_ms - first_ms) / 1000, *lengths, hash_ids)

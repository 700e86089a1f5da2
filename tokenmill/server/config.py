"""The configuration of a server, checked once and then frozen."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenmill.errors import UsageError

API_KEY_VARIABLE = "TOKENMILL_API_KEY"
"""Environment variable with keys, separated by commas."""

_MAX_KEY_FILE_BYTES = 2**20
_POSITIVE = (
    *("max_body_bytes", "max_connections", "body_timeout_s", "head_timeout_s"),
    *("write_timeout_s", "drain_timeout_s", "stall_timeout_s"),
)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a server listens, whom it serves, and where its limits lie.

    Raises UsageError where a value is outside its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    model_names: tuple[str, ...]  # names that `model` may have in a request; the first is the main
    api_keys: tuple[str, ...] = ()  # none: everybody may come
    lora_modules: tuple[tuple[str, str], ...] = ()  # adapters to begin with: name and path
    allowed_origins: tuple[str, ...] = ()  # for CORS; none: off
    max_body_bytes: int = 16 * 2**20
    max_connections: int = 2048
    body_timeout_s: float = 60.0  # in which a request's body must arrive
    head_timeout_s: float = 20.0  # in which its line and headers must
    write_timeout_s: float = 60.0  # in which a client reads nothing until it is given up
    drain_timeout_s: float = 30.0  # from SIGTERM until what still runs is aborted
    stall_timeout_s: float = 4.0  # without a step, though there is work, until /health fails

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise UsageError("served_model_name is empty: give at least one name")
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port is {self.port}, but must be from 0 to 65535")
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < 2**40:  # a NaN fails, too
                raise UsageError(f"{name} is {getattr(self, name)}, but must be above 0")
        for key in self.api_keys:
            _check_key(key, "an API key")
        names = [*self.model_names, *(name for name, _ in self.lora_modules)]
        twice = [name for name in names if names.count(name) > 1]
        if self.lora_modules and twice:
            raise UsageError(f"{twice[0]!r} is the name of two models or adapters: rename one")


def read_lora_modules(given: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Names and paths out of NAME=PATH, or of vLLM's JSON form; UsageError for anything else."""
    return tuple(map(_lora_module, given))


def _lora_module(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if text.startswith("{"):
        name, path = _json_module(text)
    if not name or not path:
        raise UsageError(f"--lora-modules is given {text!r}: write NAME=PATH")
    return name, path


def _json_module(text: str) -> tuple[str, str]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--lora-modules is given {text!r}, which is no JSON: {error}") from None
    name, path = fields.get("name"), fields.get("path")
    unknown = fields.keys() - {"name", "path", "base_model_name"}
    if unknown or not isinstance(name, str) or not isinstance(path, str):
        raise UsageError(f'--lora-modules is given {text!r}: write {{"name": ..., "path": ...}}')
    return name, path


def gather_keys(
    flags: Iterable[str], file: Path | None, environment: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """The API keys given by flag, in a file (a line each, # begins a comment), or by environment.

    Raises UsageError where a key cannot be one, or where a file or variable holds none.
    """
    keys = [*flags]
    if file is not None:
        keys += _keys_of_file(file)
    if API_KEY_VARIABLE in environment:
        named = [key.strip() for key in environment[API_KEY_VARIABLE].split(",")]
        if not any(named):
            raise UsageError(f"{API_KEY_VARIABLE} is set, but holds no key: give one or unset it")
        keys += [key for key in named if key]
    for key in keys:
        _check_key(key, "an API key")
    return tuple(dict.fromkeys(keys))


def _keys_of_file(file: Path) -> list[str]:
    try:
        with file.open(encoding="utf-8") as opened:
            text = opened.read(_MAX_KEY_FILE_BYTES)
    except OSError as error:
        raise UsageError(f"the key file {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the key file {file} is not text: give one key a line") from error
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"the key file {file} holds no key: give one a line")
    for number, key in enumerate(keys, 1):
        _check_key(key, f"key {number} in {file}")
    return keys


def _check_key(key: str, what: str) -> None:
    """A key is sent in a header; the message does not show it."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"{what} is empty or has characters other than visible ASCII")

"""The adapters that are loaded, by name."""

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenmill.errors import UsageError

if TYPE_CHECKING:
    from tokenmill.models.adapters import Adapter, AdapterReader


class AdapterExistsError(UsageError):
    """Another adapter goes by that name."""


class UnknownAdapterError(UsageError):
    """No adapter goes by that name."""


@dataclass(frozen=True)
class LoRARequest:
    """An adapter by name, loaded from `lora_path` when it is first asked for, as in vLLM.

    `lora_int_id` is taken and not used: names tell adapters apart here.
    """

    lora_name: str
    lora_int_id: int = 1
    lora_path: str = ""


class Adapters:
    """Loads and forgets adapters for one model. Any thread may use it.

    Whoever holds an adapter may go on with it after it was forgotten.
    """

    def __init__(self, reader: "AdapterReader | None") -> None:
        """Without a reader, the model takes no adapters."""
        self._reader = reader
        self._loaded: dict[str, Adapter] = {}
        self._lock = threading.RLock()
        self._resolving = threading.Lock()  # two that ask first for the same load it once

    @property
    def is_enabled(self) -> bool:
        return self._reader is not None

    def loaded(self) -> "list[Adapter]":
        with self._lock:
            return list(self._loaded.values())

    def find(self, name: str) -> "Adapter | None":
        with self._lock:
            return self._loaded.get(name)

    def load(self, name: str, path: str, *, replaces: bool = False) -> "Adapter":
        """Read an adapter from a folder. Raises the TokenmillError that says why it cannot be.

        `replaces`: another that has the name makes way; otherwise that is an AdapterExistsError.
        """
        if self._reader is None:
            raise UsageError("adapters are off: enable_lora switches them on")
        if not name:
            raise UsageError("the name of an adapter is empty")
        if not replaces:
            self._check_free(name)
        adapter = self._reader.read(name, _folder(path))
        with self._lock:
            if not replaces:
                self._check_free(name)
            self._loaded[name] = adapter
        return adapter

    def unload(self, name: str) -> "Adapter":
        """Forget an adapter; requests that have it keep it. Raises UnknownAdapterError."""
        with self._lock:
            if name not in self._loaded:
                raise UnknownAdapterError(f"no adapter {name!r} is loaded")
            return self._loaded.pop(name)

    def resolve(self, request: LoRARequest | None) -> "Adapter | None":
        """The adapter that a request names, loaded now if it is not yet."""
        if request is None:
            return None
        with self._resolving:
            adapter = self.find(request.lora_name)
            if adapter is None and request.lora_path:
                return self.load(request.lora_name, request.lora_path)
        if adapter is None:
            raise UnknownAdapterError(f"no adapter {request.lora_name!r} is loaded")
        if request.lora_path and str(_folder(request.lora_path)) != adapter.path:
            raise AdapterExistsError(
                f"adapter {request.lora_name!r} is loaded from {adapter.path}, not from "
                f"{request.lora_path}: give it another name, or unload the first"
            )
        return adapter

    def _check_free(self, name: str) -> None:
        adapter = self.find(name)
        if adapter is not None:
            raise AdapterExistsError(
                f"adapter {name!r} is loaded already, from {adapter.path}: unload it first"
            )


def _folder(path: str) -> Path:
    """The folder that a caller means, spelled in one way."""
    return Path(os.path.expanduser(path))

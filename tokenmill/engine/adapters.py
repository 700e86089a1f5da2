"""The adapters that are loaded, by name."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenmill.errors import CapacityError, UsageError

if TYPE_CHECKING:
    from tokenmill.models.adapters import Adapter, AdapterReader


class AdapterExistsError(UsageError):
    """Another adapter goes by that name."""


class UnknownAdapterError(UsageError):
    """No adapter goes by that name."""


class AdaptersBusyError(CapacityError):
    """Requests have as many adapters as fit into memory; it may be tried again later."""


@dataclass(frozen=True)
class LoRARequest:
    """An adapter by name, loaded from `lora_path` when it is first asked for, as in vLLM.

    `lora_int_id` is taken and not used: names tell adapters apart here.
    """

    lora_name: str
    lora_int_id: int = 1
    lora_path: str = ""


@dataclass(frozen=True, kw_only=True)
class KnownAdapter:
    """An adapter by name: where it comes from, and the digest of what was read there."""

    name: str
    path: str
    digest: bytes


class Adapters:
    """Loads and forgets adapters for one model. Any thread may use it.

    At most `most_in_memory` lie in memory: for another, the one that was used longest ago and
    that no request has makes way, and is read again when it is next asked for. Whoever holds an
    adapter may go on with it after it was forgotten.
    """

    def __init__(
        self,
        reader: "AdapterReader | None",
        *,
        most_in_memory: int,
        is_used: "Callable[[Adapter], bool]",
    ) -> None:
        """Without a reader, the model takes no adapters. `is_used`: has some request that one?"""
        self._reader = reader
        self._most_in_memory = most_in_memory
        self._is_used = is_used
        self._known: dict[str, KnownAdapter] = {}
        self._in_memory: OrderedDict[str, Adapter] = OrderedDict()  # the last used comes last
        self._lock = threading.RLock()
        self._reading = threading.Lock()  # two that ask first for the same load it once

    @property
    def is_enabled(self) -> bool:
        return self._reader is not None

    def known(self) -> list[KnownAdapter]:
        with self._lock:
            return list(self._known.values())

    def find(self, name: str) -> KnownAdapter | None:
        with self._lock:
            return self._known.get(name)

    def in_memory(self, name: str) -> "Adapter | None":
        """The adapter, if it need not be read for that; it then counts as used."""
        with self._lock:
            if name in self._in_memory:
                self._in_memory.move_to_end(name)
            return self._in_memory.get(name)

    def get(self, name: str) -> "Adapter":
        """The adapter, read again if it had to make way.

        Raises UnknownAdapterError, AdaptersBusyError, and the TokenmillError that says why what
        was there once cannot be read now.
        """
        with self._reading:
            if adapter := self.in_memory(name):
                return adapter
            known = self.find(name)
            if known is None:
                raise UnknownAdapterError(f"no adapter {name!r} is loaded")
            adapter = self._read(name, known.path)
            if adapter.digest != known.digest:
                raise UsageError(
                    f"adapter {name!r}: {known.path} has changed since it was loaded: load it again"
                )
            with self._lock:
                if self._known.get(name) is known:
                    self._keep(adapter)
            return adapter

    def load(self, name: str, path: str, *, replaces: bool = False) -> "Adapter":
        """Read an adapter from a folder. Raises the TokenmillError that says why it cannot be.

        `replaces`: another that has the name makes way; otherwise that is an AdapterExistsError.
        """
        with self._reading:
            return self._load(name, path, replaces=replaces)

    def unload(self, name: str) -> "Adapter | None":
        """Forget an adapter; requests that have it keep it. Raises UnknownAdapterError.

        None: it was not in memory, so that no request has it.
        """
        with self._lock:
            if name not in self._known:
                raise UnknownAdapterError(f"no adapter {name!r} is loaded")
            del self._known[name]
            return self._in_memory.pop(name, None)

    def resolve(self, request: LoRARequest | None) -> "Adapter | None":
        """The adapter that a request names, loaded now if it is not yet."""
        if request is None:
            return None
        with self._reading:
            known = self.find(request.lora_name)
            if known is None and request.lora_path:
                return self._load(request.lora_name, request.lora_path, replaces=False)
        if known and request.lora_path and str(_folder(request.lora_path)) != known.path:
            raise AdapterExistsError(
                f"adapter {request.lora_name!r} is loaded from {known.path}, not from "
                f"{request.lora_path}: give it another name, or unload the first"
            )
        return self.get(request.lora_name)

    def _load(self, name: str, path: str, *, replaces: bool) -> "Adapter":
        if not name:
            raise UsageError("the name of an adapter is empty")
        if not replaces and (known := self.find(name)):
            raise AdapterExistsError(
                f"adapter {name!r} is loaded already, from {known.path}: unload it first, or set "
                "load_inplace"
            )
        adapter = self._read(name, path)
        with self._lock:
            self._in_memory.pop(name, None)
            self._keep(adapter)
            self._known[name] = KnownAdapter(name=name, path=adapter.path, digest=adapter.digest)
        return adapter

    def _read(self, name: str, path: str) -> "Adapter":
        if self._reader is None:
            raise UsageError("adapters are off: enable_lora switches them on")
        return self._reader.read(name, _folder(path))

    def _keep(self, adapter: "Adapter") -> None:
        """Have an adapter in memory. Raises AdaptersBusyError where none of the others may go."""
        while len(self._in_memory) >= self._most_in_memory:
            unused = (name for name, held in self._in_memory.items() if not self._is_used(held))
            name = next(unused, None)
            if name is None:
                raise AdaptersBusyError(
                    f"{self._most_in_memory} adapters are in use, which is as many as are kept in "
                    "memory: try again later, or raise max_cpu_loras"
                )
            del self._in_memory[name]
        self._in_memory[adapter.name] = adapter


def _folder(path: str) -> Path:
    """The folder that a caller means, spelled in one way."""
    return Path(os.path.expanduser(path))

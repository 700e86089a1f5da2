"""Adapters by name, and how many of them lie in memory."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest
from fake_model import make_adapter

from tokenmill.engine.adapters import (
    AdapterExistsError,
    Adapters,
    AdaptersBusyError,
    LoRARequest,
    UnknownAdapterError,
)
from tokenmill.errors import UsageError
from tokenmill.models.adapters import Adapter, AdapterReader


@dataclass
class FakeReader:
    """Makes an adapter of a path, whose content can be changed; counts what it reads."""

    contents: dict[str, str] = field(default_factory=dict)
    read_names: list[str] = field(default_factory=list)

    def read(self, name: str, path: Path) -> Adapter:
        self.read_names.append(name)
        return replace(make_adapter(name, self.contents.get(str(path), str(path))), path=str(path))


def make(
    reader: FakeReader, most: int, is_used: Callable[[Adapter], bool] = lambda adapter: False
) -> Adapters:
    return Adapters(cast(AdapterReader, reader), most_in_memory=most, is_used=is_used)


def test_who_was_used_longest_ago_makes_way() -> None:
    reader = FakeReader()
    adapters = make(reader, 2)
    for name in "ab":
        adapters.load(name, f"/{name}")
    adapters.get("a")
    adapters.load("c", "/c")
    assert [known.name for known in adapters.known()] == ["a", "b", "c"]
    assert adapters.in_memory("b") is None
    reader.read_names.clear()
    assert adapters.get("a") is adapters.in_memory("a")
    assert reader.read_names == []
    assert adapters.get("b").digest == make_adapter("b", "/b").digest
    assert reader.read_names == ["b"]
    assert adapters.in_memory("c") is None


def test_what_a_request_has_stays() -> None:
    used: list[Adapter] = []
    adapters = make(FakeReader(), 2, used.__contains__)
    used.append(adapters.load("a", "/a"))
    used.append(adapters.load("b", "/b"))
    with pytest.raises(AdaptersBusyError, match=r"2 adapters are in use.*raise max_cpu_loras"):
        adapters.load("c", "/c")
    assert adapters.find("c") is None
    used.pop()
    adapters.load("c", "/c")
    assert adapters.in_memory("a") is used[0]
    assert adapters.in_memory("b") is None


def test_one_that_was_replaced_takes_no_second_place() -> None:
    reader = FakeReader()
    adapters = make(reader, 1, lambda adapter: True)
    first = adapters.load("a", "/a")
    with pytest.raises(AdapterExistsError, match="unload it first, or set load_inplace"):
        adapters.load("a", "/b")
    assert adapters.load("a", "/b", replaces=True) is not first
    assert adapters.known()[0].path == "/b"
    assert adapters.unload("a") is not None
    with pytest.raises(UnknownAdapterError):
        adapters.unload("a")
    with pytest.raises(UnknownAdapterError):
        adapters.get("a")


def test_what_changed_on_disk_is_not_what_was_loaded() -> None:
    reader = FakeReader()
    adapters = make(reader, 1)
    adapters.load("a", "/a")
    adapters.load("b", "/b")
    reader.contents["/a"] = "other"
    with pytest.raises(UsageError, match="'a': /a has changed since it was loaded"):
        adapters.get("a")
    assert adapters.unload("a") is None  # it was not in memory


def test_a_request_loads_what_it_names() -> None:
    reader = FakeReader()
    adapters = make(reader, 1)
    asked = [LoRARequest("a", 1, "/a"), LoRARequest("b", 2, "/b"), LoRARequest("a", 1, "")]
    digests = [found.digest for each in asked if (found := adapters.resolve(each))]
    assert digests[0] == digests[2] != digests[1]
    assert reader.read_names == ["a", "b", "a"]
    with pytest.raises(AdapterExistsError, match="is loaded from /a, not from /b"):
        adapters.resolve(LoRARequest("a", 1, "/b"))
    assert adapters.resolve(None) is None

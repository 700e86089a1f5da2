"""What a compilation and a start look at: one instruction set, and the formats in use."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backend import llvm_models
from tests.backend.traffic import make_limits
from tokenmill.backends.llvm import lower_linear, lower_rows, packing, target, tiles
from tokenmill.backends.llvm.objects import ObjectCache
from tokenmill.backends.llvm.target import ROWS, Row, pick_row
from tokenmill.config import ACTIVATIONS
from tokenmill.ir import formats
from tokenmill.ir.build import FunctionBuilder, finish_graph
from tokenmill.ir.formats import quantize
from tokenmill.ir.graph import Graph


class Watched(dict[Any, Any]):
    """A table that notes which of its rows are looked up, and lets nobody go through all."""

    def __init__(self, table: dict[Any, Any]) -> None:
        super().__init__(table)
        self.used: set[Any] = set()

    def __getitem__(self, key: Any) -> Any:
        self.used.add(key)
        return super().__getitem__(key)

    def refuse(self, *_: object) -> Iterator[Any]:
        raise AssertionError("somebody goes through a whole table")

    __iter__ = keys = values = items = refuse  # type: ignore[assignment]


class Unread(tuple[Row, ...]):
    """A table of rows that nobody reads."""

    __slots__ = ()

    def refuse(self, *_: object) -> Iterator[Row]:
        raise AssertionError("somebody reads the table of rows")

    __iter__ = __getitem__ = refuse  # type: ignore[assignment]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """The table of formats, in every module that knows it."""
    table = Watched(formats.FORMATS)
    for module in list(sys.modules.values()):
        if getattr(module, "FORMATS", None) is formats.FORMATS and module is not formats:
            monkeypatch.setattr(module, "FORMATS", table)
    monkeypatch.setattr(formats, "FORMATS", table)
    return table


def small_graph() -> Graph:
    """An embedding and a head."""
    f = FunctionBuilder("main")
    tokens, _ = f.param("tokens", "i32", "T"), f.param("place", "place", "T")
    rows, sampling = f.param("rows", "i32", "R"), f.param("sampling", "sampling", "R")
    x = f.select_rows(f.embed(tokens, f.weight("embed", 60, 64)), rows)
    logits = f.linear(x, f.weight("lm_head", 60, 64))
    return finish_graph("small", f, logits, f.sample(logits, sampling))


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_a_compilation_looks_at_one_row_and_at_the_formats_in_use(
    activations: str, watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    names = {"embed": "q8", "lm_head": "q4_k"}
    weights = {
        name: quantize(rng.standard_normal((60, 64), np.float32), kind)
        for name, kind in names.items()
    }
    packings = Watched(packing.PACKINGS)
    for module in (lower_rows, lower_linear, tiles):
        monkeypatch.setattr(module, "PACKINGS", packings)
    row = pick_row()
    monkeypatch.setattr(target, "ROWS", Unread())
    monkeypatch.setattr(llvm_models, "pick_row", lambda: row)
    watched.used.clear()
    model = llvm_models.make_llvm_model(
        small_graph(),
        weights,
        limits=make_limits(60),
        objects=ObjectCache(tmp_path),
        activations=activations,
        threads=1,
    )
    model.warm_up()
    model.close()
    assert watched.used == set(names.values())
    assert {key[0] for key in packings.used} == set(names.values())


def test_choosing_a_row_asks_only_what_better_ones_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a longer table costs a look at some names of features, a microsecond a row."""
    asked: list[str] = []

    def missing(row: Row) -> tuple[str, ...]:
        asked.append(row.name)
        return target_missing(row)

    target_missing = target.missing_features
    monkeypatch.delenv(target.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(target, "missing_features", missing)
    chosen = pick_row()
    names = [row.name for row in ROWS]
    assert asked == names[: names.index(chosen.name) + 1]

"""From a model's name to a compiled model: what is allocated, kept, and said on the way."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.model_files import write_runnable_gguf
from tests.unit.notes import Notes
from tokenmill.backends.base import BLOCK_SIZE
from tokenmill.backends.llvm.workers import num_usable_threads
from tokenmill.config import EngineConfig
from tokenmill.fingerprint import code_fingerprint
from tokenmill.models.loader import LoadedModel, load_model


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TOKENMILL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_runnable_gguf(tmp_path / "tiny.gguf")


@contextmanager
def loaded(path: Path, notes: Notes, **options) -> Iterator[LoadedModel]:
    defaults = {"kv_cache_memory_bytes": 2**22, "threads": 1, "quantization": "f32"}
    model = load_model(EngineConfig(model=str(path), **(defaults | options)), progress=notes)
    yield model
    model.compiled.close()


def test_a_context_beyond_all_memory_is_cut_to_the_pool(home, tmp_path, notes):
    path = write_runnable_gguf(tmp_path / "long.gguf", {"llama.context_length": 2**29})
    with loaded(path, notes) as model:
        limits = model.compiled.limits
        assert limits.blocks_per_sequence == limits.blocks
        [line] = notes.lines
        assert f"room for {limits.blocks * BLOCK_SIZE} of {2**29} tokens" in line


def test_a_context_that_fits_is_not_cut(home, model, notes):
    with loaded(model, notes) as found:
        assert found.compiled.limits.blocks_per_sequence * BLOCK_SIZE == 128
    assert notes.lines == []


def test_threads_beyond_the_processors_are_remarked_on(home, model, notes):
    usable = num_usable_threads()
    with loaded(model, notes, threads=usable):
        assert notes.lines == []
    with loaded(model, notes, threads=usable + 1):
        [line] = notes.lines
        assert line.startswith(f"{usable + 1} threads share {usable} processors")


# -- what is kept on disk


def entries(home: Path, kind: str) -> set[str]:
    return {path.name for path in (home / "packed").glob(f"*.{kind}")}


def test_an_edit_of_the_code_that_decodes_leaves_no_kept_weights_valid(
    home, model, notes, monkeypatch
):
    with loaded(model, notes):
        before = entries(home, "tmc")
    with loaded(model, notes):
        assert entries(home, "tmc") == before

    def edited(*folders: str) -> str:
        return "edited" if "models" in folders else code_fingerprint(*folders)

    monkeypatch.setattr("tokenmill.models.loader.code_fingerprint", edited)
    with loaded(model, notes):
        assert len(entries(home, "tmc") - before) == 2, "the weights and what rounding cost"


def test_an_edit_of_the_code_that_builds_tokenizers_leaves_no_kept_one_valid(
    home, model, notes, monkeypatch
):
    with loaded(model, notes):
        [name] = entries(home, "tokenizer.json")
    before = (home / "packed" / name).read_bytes()
    monkeypatch.setattr(
        "tokenmill.models.text.tokenizer_cache.code_fingerprint", lambda *_: "edited"
    )
    with loaded(model, notes):
        after = (home / "packed" / name).read_bytes()
    assert b" edited " in after.partition(b"\n")[0]
    assert after.partition(b"\n")[2] == before.partition(b"\n")[2]


def test_the_error_of_requantisation_is_told_at_every_start(home, model):
    told = []
    for _ in range(2):
        notes = Notes()
        with loaded(model, notes, quantization="q4"):
            told.append(notes.lines)
    assert "F32 weights became q4" in "".join(told[0])
    assert told[0] == told[1]


def test_weights_whose_report_is_gone_are_packed_again(home, model, notes):
    with loaded(model, notes, quantization="q4"):
        [report] = (home / "packed").glob("*-rounding.tmc")
    report.unlink()
    with loaded(model, notes, quantization="q4"):
        assert report.exists()
    assert len(set(notes.lines)) == len(notes.lines) / 2, "told twice"


def test_caches_beyond_the_limit_lose_what_earlier_starts_left(home, model, notes, monkeypatch):
    with loaded(model, notes):
        before = entries(home, "tmc")
    for path in (*(home / "packed").iterdir(), *(home / "objects").iterdir()):
        os.utime(path, ns=(0, path.stat().st_mtime_ns))
    monkeypatch.setenv("TOKENMILL_CACHE_GB", "0")
    with loaded(model, notes):
        assert entries(home, "tmc") == before, "what this start uses stays"
    monkeypatch.setattr("tokenmill.models.loader.code_fingerprint", lambda *_: "edited")
    for path in (home / "packed").iterdir():
        os.utime(path, ns=(0, path.stat().st_mtime_ns))
    with loaded(model, notes):
        assert not entries(home, "tmc") & before
    assert "old code and packed weights were deleted: 0 B may be kept" in notes.lines[-1]

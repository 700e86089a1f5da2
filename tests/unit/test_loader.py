"""From a model's name to a compiled model: what is allocated, kept, and said on the way."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.model_files import write_runnable_gguf
from tokenmill.backends.base import BLOCK_SIZE
from tokenmill.config import EngineConfig
from tokenmill.models.loader import LoadedModel, load_model
from tokenmill.models.progress import SilentProgress


class Notes(SilentProgress):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


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

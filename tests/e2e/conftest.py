"""The small real model, fetched once as a user's first start would fetch it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.command import ask, assert_answered
from tokenmill.errors import ModelNotFoundError
from tokenmill.models.sources import fetch, is_offline

QWEN_VARIABLE = "TOKENMILL_TEST_QWEN"
"""Names a GGUF file of a Qwen2.5 model, which is too large to fetch for a test."""


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's file, kept where the user's own models are."""
    try:
        return fetch("smollm2").path
    except ModelNotFoundError as error:
        if is_offline() or "cannot be reached" in str(error):
            pytest.skip(f"the default model is not on disk and cannot be fetched: {error}")
        raise


@pytest.fixture(scope="session")
def qwen() -> Path:
    if QWEN_VARIABLE not in os.environ:
        pytest.skip(f"{QWEN_VARIABLE} names no Qwen2.5 file")
    return Path(os.environ[QWEN_VARIABLE])


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for what this process compiles and packs."""
    home = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENMILL_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def warm_home(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a first start has filled, and that later starts add to."""
    home = tmp_path_factory.mktemp("home")
    assert_answered(ask(smollm2, home))
    return home

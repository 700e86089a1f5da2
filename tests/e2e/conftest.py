"""The small real model, fetched once as a user's first start would fetch it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.command import ask, assert_answered
from tests.e2e.small_qwen import write_small_qwen
from tokenmill.errors import ModelNotFoundError
from tokenmill.models.home import home_dir
from tokenmill.models.sources import fetch, is_offline

QWEN = "qwen2.5-coder-1.5b"
QWEN_VARIABLE = "TOKENMILL_TEST_QWEN"
"""Names a GGUF file of a Qwen2.5 model, which is too large to fetch for a test."""

USERS_HOME = home_dir()
"""Where models are sought, whatever folder a test keeps its caches in."""


def fetched(name: str) -> Path:
    """A model's file, kept where the user's own models are."""
    try:
        return fetch(name, home=USERS_HOME).path
    except ModelNotFoundError as error:
        if is_offline() or "cannot be reached" in str(error):
            pytest.skip(f"{name} is not on disk and cannot be fetched: {error}")
        raise


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model."""
    return fetched("smollm2")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """A model with two kinds of layers."""
    return fetched("gemma3-270m")


@pytest.fixture(scope="session")
def qwen() -> Path:
    """The real Qwen2.5, where the user has it."""
    if QWEN_VARIABLE in os.environ:
        return Path(os.environ[QWEN_VARIABLE])
    try:
        return fetch(QWEN, home=USERS_HOME, offline=True).path
    except ModelNotFoundError:
        pytest.skip(f"{QWEN} is not on disk, and {QWEN_VARIABLE} names no Qwen2.5 file")


@pytest.fixture(scope="session")
def small_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of the real one's kind with random weights: biases, six queries to a key, wide heads.

    Its output head is a matrix of its own, which the real small ones tie to the embedding.
    """
    return write_small_qwen(tmp_path_factory.mktemp("small_qwen"))


@pytest.fixture(scope="session")
def caches_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def caches(caches_folder: Path) -> Iterator[Path]:
    """A folder for what this process compiles and packs; the tests of a session fill one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENMILL_HOME", str(caches_folder))
        yield caches_folder


@pytest.fixture(scope="session")
def warm_home(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a first start has filled, and that later starts add to."""
    home = tmp_path_factory.mktemp("home")
    assert_answered(ask(smollm2, home))
    return home

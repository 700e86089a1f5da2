"""What lies on disk between two starts is used when it is sound, and rebuilt when it is not."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.command import (
    PROGRAM,
    QUESTION,
    ask,
    ask_words,
    assert_answered,
    environment,
    run_command,
)
from tests.unit.model_files import write_runnable_gguf


@pytest.fixture(scope="module")
def filled(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one first start leaves; nobody changes it."""
    home = tmp_path_factory.mktemp("filled")
    assert_answered(ask(smollm2, home))
    return home


@pytest.fixture
def home(filled: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(filled, tmp_path / "home")


def cached_files(home: Path) -> list[Path]:
    """Compiled objects, packed weights and the built tokenizer."""
    return sorted(p for p in home.rglob("*") if p.is_file())


def contents(home: Path) -> dict[str, bytes]:
    return {str(p.relative_to(home)): p.read_bytes() for p in cached_files(home)}


def test_a_start_fills_all_three_caches(filled):
    names = [p.name for p in cached_files(filled)]
    assert sum(name.endswith(".tmc") for name in names) >= 3
    assert sum(name.endswith(".tokenizer.json") for name in names) == 1
    assert not [name for name in names if name.startswith((".", "tmp-"))]


def test_a_second_start_builds_nothing(smollm2, home):
    before = {p: p.stat().st_mtime_ns for p in cached_files(home)}
    done = ask(smollm2, home)
    assert_answered(done)
    assert "decoding" not in done.stderr
    assert {p: p.stat().st_mtime_ns for p in cached_files(home)} == before


PLACES = {
    "magic": lambda size: 0,
    "header": lambda size: 17,
    "early": lambda size: min(4096, size // 4),
    "middle": lambda size: size // 2,
    "end": lambda size: size - 1,
}


@pytest.mark.parametrize("place", PLACES)
def test_one_flipped_bit_in_every_file_is_noticed(smollm2, home, place):
    sound = contents(home)
    for path in cached_files(home):
        data = bytearray(path.read_bytes())
        data[PLACES[place](len(data))] ^= 0x40
        path.write_bytes(data)
    assert_answered(ask(smollm2, home))
    assert contents(home) == sound


@pytest.mark.parametrize("keep", [0, 100, 5_000])
def test_truncated_files_are_rebuilt(smollm2, home, keep):
    sound = contents(home)
    for path in cached_files(home):
        os.truncate(path, min(keep, path.stat().st_size - 1))
    assert_answered(ask(smollm2, home))
    assert contents(home) == sound


def test_files_under_the_names_of_others_are_not_trusted(smollm2, home):
    sound = contents(home)
    objects = sorted((home / "objects").glob("*.tmc"))
    swapped = [p.read_bytes() for p in objects]
    for path, data in zip(objects, [*swapped[1:], swapped[0]], strict=True):
        path.write_bytes(data)
    assert_answered(ask(smollm2, home))
    assert contents(home) == sound


def test_what_killed_writers_left_behind_is_swept_up(smollm2, home):
    old = home / "objects" / "tmp-of-yesterday"
    old.write_bytes(b"half a file")
    os.utime(old, (0, 0))
    next((home / "objects").glob("*.tmc")).unlink()
    assert_answered(ask(smollm2, home))
    assert not old.exists()


def test_two_first_starts_at_once(smollm2, filled, tmp_path):
    command = [*PROGRAM, "run", QUESTION, "--model", str(smollm2), "--temperature", "0"]
    processes = [
        subprocess.Popen(
            command,
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert_answered(subprocess.CompletedProcess(command, process.returncode, out, err))
    assert contents(tmp_path) == contents(filled)


# -- a folder that cannot be written


def test_a_full_disk_costs_the_caches_and_not_the_answer(smollm2, tmp_path):
    done = run_command(*ask_words(smollm2), home=tmp_path, max_file_bytes=8192)
    assert_answered(done)
    assert "cannot be written (File too large)" in done.stderr
    assert "no space left" in done.stderr
    assert "every start builds the tokenizer anew" in done.stderr
    assert not [p.name for p in cached_files(tmp_path) if p.stat().st_size > 8192]
    assert not [p for p in cached_files(tmp_path) if p.name.endswith("tokenizer.json")]


def test_a_home_that_is_no_folder_costs_notes_and_not_the_answer(tmp_path):
    model = write_runnable_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "file").write_text("in the way")
    done = ask(model, tmp_path / "file", "--max-tokens", "2")
    assert done.returncode == 0
    assert done.stdout
    assert "cannot write to" in done.stderr
    assert "TOKENMILL_HOME" in done.stderr


def test_objects_that_cannot_be_kept_cost_a_warning(smollm2, home):
    shutil.rmtree(home / "objects")
    (home / "objects").write_text("in the way")
    done = ask(smollm2, home)
    assert_answered(done)
    assert "work goes on without it" in done.stderr


@contextmanager
def read_only(*folders: Path) -> Iterator[None]:
    for folder in folders:
        folder.chmod(0o500)
    try:
        yield
    finally:
        for folder in folders:
            folder.chmod(0o700)


def test_a_read_only_folder_that_is_filled_is_enough(smollm2, home):
    before = contents(home)
    with read_only(home / "objects", home / "packed", home):
        done = run_command(*ask_words(smollm2), home=home, obeys_modes=True)
    assert_answered(done)
    assert "cannot" not in done.stderr
    assert contents(home) == before


def test_a_read_only_folder_that_is_empty_costs_notes_and_not_the_answer(tmp_path):
    model, home = write_runnable_gguf(tmp_path / "tiny.gguf"), tmp_path / "home"
    home.mkdir()
    with read_only(home):
        arguments = ("run", QUESTION, "--model", str(model), "--max-tokens", "2")
        done = run_command(*arguments, home=home, obeys_modes=True)
    assert done.returncode == 0
    assert done.stdout
    assert "cannot write to" in done.stderr
    assert "Permission denied" in done.stderr
    assert contents(home) == {}

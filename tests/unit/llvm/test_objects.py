import itertools
import logging
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenmill.backends.llvm import objects
from tokenmill.backends.llvm.objects import CHUNK_SIZE, HEADER_SIZE, ObjectCache, cache_key
from tokenmill.backends.llvm.target import pick_row

LARGE = np.random.default_rng(0).bytes(2 * CHUNK_SIZE + 12345)


@pytest.fixture
def cache(tmp_path: Path) -> ObjectCache:
    return ObjectCache(tmp_path / "made" / "by" / "us")


def read(cache: ObjectCache, key: str, num_threads: int = 2) -> bytes | None:
    found = cache.read_into(key, lambda size: memoryview(bytearray(size)), num_threads=num_threads)
    return None if found is None else bytes(found)


@pytest.mark.parametrize("data", [b"", b"code", LARGE])
def test_what_is_put_is_got(cache, data):
    assert cache.get("a") is None
    cache.put("a", data)
    cache.put("b", b"other")
    assert cache.get("a") == data
    cache.put("a", b"newer")
    assert cache.get("a") == b"newer"


def test_built_once(cache):
    calls = []

    def build() -> bytes:
        calls.append(1)
        return b"object"

    assert [cache.get_or_build("a", build) for _ in range(3)] == [b"object"] * 3
    assert len(calls) == 1


@given(st.lists(st.integers(0, 3 * CHUNK_SIZE // 2), max_size=4))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stream_is_its_parts_in_order_however_they_are_cut(cache, sizes):
    ends = np.cumsum([0, *sizes])
    parts = [memoryview(LARGE * 3)[a:b] for a, b in itertools.pairwise(ends)]
    cache.put_stream("w", parts)
    for num_threads in (1, 3):
        assert read(cache, "w", num_threads) == b"".join(parts)


def test_a_stream_takes_arrays(cache):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    cache.put_stream("w", [array.data, array.data])
    assert read(cache, "w") == array.tobytes() * 2


def test_a_payload_can_be_verified_and_mapped(cache):
    cache.put_stream("w", [LARGE])
    with cache.open_payload("w") as payload:
        assert payload.verify()
        assert payload.offset % 4096 == 0
        payload.file.seek(payload.offset)
        assert payload.file.read(payload.length) == LARGE


SMALL = b"machine code" * 9


@pytest.mark.parametrize("is_stream", [False, True])
@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_anywhere_is_found_and_the_file_deleted(cache, is_stream, data):
    if is_stream:
        cache.put_stream("a", [SMALL])
    else:
        cache.put("a", SMALL)
    path = cache.path("a")
    raw = bytearray(path.read_bytes())
    # The zeros that fill the header say nothing, yet must be zeros; draw most bits elsewhere.
    interesting = st.integers(0, 255) | st.integers(HEADER_SIZE, len(raw) - 1)
    at = data.draw(interesting | st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    assert cache.get("a") is None
    assert not path.exists()
    assert cache.get_or_build("a", lambda: b"again") == b"again"


@given(st.integers(0, HEADER_SIZE + len(SMALL) + 40))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_length_is_refused(cache, length):
    cache.put("a", SMALL)
    raw = cache.path("a").read_bytes()
    if length == len(raw):
        return
    cache.path("a").write_bytes(raw[:length].ljust(length, b"\0"))
    assert cache.get("a") is None


def test_damage_in_a_late_chunk_is_found(cache):
    cache.put_stream("w", [LARGE])
    raw = bytearray(cache.path("w").read_bytes())
    raw[HEADER_SIZE + 2 * CHUNK_SIZE + 5] ^= 4
    cache.path("w").write_bytes(raw)
    with cache.open_payload("w") as payload:
        assert not payload.verify()
    assert read(cache, "w") is None
    assert not cache.path("w").exists()


@pytest.mark.parametrize("text", [b"", b"\x7fELF not ours", b"\0" * 5000])
def test_a_foreign_file_is_refused(cache, text):
    cache.put("a", b"")
    cache.path("a").write_bytes(text)
    assert cache.get("a") is None


def test_an_entry_under_another_name_is_foreign(cache):
    cache.put("a", b"code for a")
    cache.path("a").rename(cache.path("b"))
    assert cache.get("b") is None


@pytest.mark.parametrize("key", ["", "../up", "a/b", "x" * 129])
def test_a_key_is_a_plain_file_name(cache, key):
    with pytest.raises(ValueError, match="key"):
        cache.get(key)


def test_a_directory_that_cannot_be_written_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = ObjectCache(tmp_path / "file" / "cache")
    with caplog.at_level(logging.WARNING):
        assert cache.get_or_build("a", lambda: b"built") == b"built"
        assert cache.get_or_build("a", lambda: b"again") == b"again"
    assert len(caplog.records) == 1
    assert str(cache.directory) in caplog.text
    assert "choose another" in caplog.text


def test_a_full_disk_leaves_nothing_behind(cache, monkeypatch, caplog):
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(objects.os, "fsync", fail)
    cache.put("a", b"data")
    assert "No space left" in caplog.text
    assert list(cache.directory.iterdir()) == []


def test_an_error_while_building_the_stream_reaches_the_caller(cache):
    def parts():
        yield b"half"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.put_stream("w", parts())
    assert list(cache.directory.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_in_time(cache):
    cache.put("a", b"x")
    old, new = cache.directory / "tmp-old", cache.directory / "tmp-new"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    long_ago = time.time() - 2 * objects.STALE_AFTER_S
    os.utime(old, (long_ago, long_ago))
    cache.put("b", b"x")
    assert not old.exists()
    assert new.exists()


def _fill(directory: Path, data: bytes) -> None:
    cache = ObjectCache(directory)
    for _ in range(20):
        cache.put_stream("w", [data])
        found = cache.read_into("w", lambda size: memoryview(bytearray(size)))
        assert found is not None


def test_two_processes_fill_at_once(cache):
    spawn = multiprocessing.get_context("spawn")
    contents = [bytes([n]) * 300_000 for n in (1, 2)]
    processes = [spawn.Process(target=_fill, args=(cache.directory, c)) for c in contents]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0]
    assert read(cache, "w") in contents
    assert len(list(cache.directory.iterdir())) == 1


def test_a_key_depends_on_every_part_the_row_and_the_cut_between_parts():
    row, portable = pick_row(), pick_row("portable")
    keys = [
        cache_key("graph", 1, row=row),
        cache_key("graph", 2, row=row),
        cache_key("graph", "1", row=row),
        cache_key("graph1", row=row),
        cache_key(b"graph", 1, row=row),
    ]
    if row != portable:
        keys.append(cache_key("graph", 1, row=portable))
    assert len(set(keys)) == len(keys)
    assert cache_key("graph", 1, row=row) == keys[0]

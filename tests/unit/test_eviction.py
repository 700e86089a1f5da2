"""Which of the files that can be rebuilt go first."""

import errno
import os

import pytest

from tokenmill.errors import UsageError
from tokenmill.models.eviction import cache_limit_bytes, clear_cache, evict, measure_cache

NOW_NS = 10**18


@pytest.fixture
def home(tmp_path):
    """Five entries of 100 bytes, each used a second after the one before."""
    for number, name in enumerate(("packed/a", "objects/b", "packed/c", "objects/d", "packed/e")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, ns=(NOW_NS + number * 10**9, 0))
    return tmp_path


def left(home):
    return "".join(sorted(path.name for path in home.glob("*/*")))


@pytest.mark.parametrize(
    ("limit_bytes", "names"), [(500, "abcde"), (499, "bcde"), (250, "de"), (99, ""), (0, "")]
)
def test_the_least_recently_used_go_until_the_rest_fits(home, limit_bytes, names):
    assert evict(limit_bytes, NOW_NS + 10**10, home) == 100 * (5 - len(names))
    assert left(home) == names
    assert measure_cache(home).total_bytes == 100 * len(names)


def test_what_is_in_use_stays_whatever_the_limit(home):
    assert evict(0, NOW_NS + 3 * 10**9, home) == 300
    assert left(home) == "de"


def test_what_is_no_entry_is_left_alone(home):
    (home / "packed" / "folder").mkdir()
    (home / "packed" / "tmp-half").write_bytes(bytes(1000))
    (home / "models").mkdir()
    (home / "models" / "model.gguf").write_bytes(bytes(1000))
    evict(0, 2 * NOW_NS, home)
    assert left(home) == "foldermodel.gguftmp-half"


def test_nothing_on_disk_takes_no_space(tmp_path):
    assert measure_cache(tmp_path).total_bytes == 0
    assert evict(0, NOW_NS, tmp_path) == 0


def test_the_limit_is_a_number_of_gigabytes(monkeypatch):
    monkeypatch.delenv("TOKENMILL_CACHE_GB", raising=False)
    assert cache_limit_bytes() == 30 * 10**9
    monkeypatch.setenv("TOKENMILL_CACHE_GB", "0.5")
    assert cache_limit_bytes() == 5 * 10**8


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf"])
def test_another_limit_is_refused(monkeypatch, text):
    monkeypatch.setenv("TOKENMILL_CACHE_GB", text)
    with pytest.raises(UsageError, match=f"TOKENMILL_CACHE_GB is '{text}'"):
        cache_limit_bytes()


def test_code_and_weights_are_measured_apart(home):
    size = measure_cache(home)
    assert (size.compiled_code_bytes, size.packed_weights_bytes) == (200, 300)


def test_all_can_be_deleted_but_what_is_being_written(home):
    (home / "packed" / "tmp-half").write_bytes(bytes(1000))
    assert clear_cache(home) == 500
    assert left(home) == "tmp-half"
    assert clear_cache(home) == 0


def test_what_cannot_be_deleted_is_named_and_the_rest_goes(home, monkeypatch):
    unlink = type(home).unlink

    def refuse(path, missing_ok=False):
        if path.name == "b":
            raise PermissionError(errno.EACCES, "Permission denied")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(type(home), "unlink", refuse)
    with pytest.raises(UsageError, match=r"cannot delete .*objects/b \(Permission denied\)"):
        clear_cache(home)
    assert left(home) == "b"

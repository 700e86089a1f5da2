import errno
from pathlib import Path

import pytest

from tokenmill.errors import CapacityError, UsageError
from tokenmill.models import home


def test_folders_lie_below_tokenmill_home(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENMILL_HOME", str(tmp_path))
    assert home.models_dir() == tmp_path / "models"
    assert home.objects_dir() == tmp_path / "objects"
    assert home.packed_dir() == tmp_path / "packed"


def test_without_setting_the_users_cache_serves(monkeypatch, tmp_path):
    monkeypatch.delenv("TOKENMILL_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home.home_dir() == tmp_path / "tokenmill"


def test_a_folder_that_cannot_be_made_is_a_readable_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot write to .*file/models.*set TOKENMILL_HOME"):
        home.make_dir(tmp_path / "file" / "models")


def test_a_place_where_no_folder_can_be_is_a_readable_error():
    with pytest.raises(UsageError, match=r"cannot write to /proc/nope/models .*TOKENMILL_HOME"):
        home.make_dir(Path("/proc/nope/models"))


def test_a_disk_that_fails_is_a_readable_error():
    with (
        pytest.raises(UsageError, match=r"cannot write to /x .*TOKENMILL_HOME"),
        home.storage_errors(Path("/x")),
    ):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_capacity_error(number):
    with (
        pytest.raises(CapacityError, match=r"no space left for /x: .*HF_HOME"),
        home.storage_errors(Path("/x"), "HF_HOME"),
    ):
        raise OSError(number, "full")


def test_other_errors_of_the_system_are_not_disguised():
    with pytest.raises(InterruptedError), home.storage_errors(Path("/x")):
        raise InterruptedError(errno.EINTR, "interrupted")


def test_write_atomically_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "file"
    home.write_atomically(path, b"old")
    home.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    home.write_atomically(path, b"old")

    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(CapacityError):
        home.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (98_362_432, "98.4 MB"), (3 * 10**15, "3000.0 TB")],
)
def test_format_bytes(num_bytes, text):
    assert home.format_bytes(num_bytes) == text

"""Where tokenmill keeps what it fetched and what it built, and what is said when it cannot.

`TOKENMILL_HOME` names the folder; without it, the user's cache folder serves.
"""

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenmill.errors import CapacityError, UsageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ENOENT, errno.EIO),  # a folder of /proc; a disk that fails
}


def home_dir() -> Path:
    """The folder that holds everything below; it need not exist yet."""
    if chosen := os.environ.get("TOKENMILL_HOME"):
        return Path(os.path.expanduser(chosen)).absolute()
    import platformdirs

    return platformdirs.user_cache_path("tokenmill")


def models_dir(home: Path | None = None) -> Path:
    """Fetched models, a folder each."""
    return (home or home_dir()) / "models"


def objects_dir(home: Path | None = None) -> Path:
    """Compiled objects."""
    return (home or home_dir()) / "objects"


def packed_dir(home: Path | None = None) -> Path:
    """Weights, packed for the processor."""
    return (home or home_dir()) / "packed"


def make_dir(path: Path) -> Path:
    """Create a folder and its parents, and give it back.

    Raises UsageError where it may not be created, CapacityError where the disk is full.
    """
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def storage_errors(path: Path, setting: str = "TOKENMILL_HOME") -> Iterator[None]:
    """Turn the operating system's refusals to write below `path` into one readable line.

    `setting` is the environment variable that chooses another folder.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise CapacityError(
                f"no space left for {path}: free some, or set {setting} to a folder on a "
                "larger disk"
            ) from error
        if error.errno in _REFUSED:
            raise UsageError(
                f"cannot write to {path} ({error.strerror}): set {setting} to a folder that can be "
                "written"
            ) from error
        raise


def require_space(folder: Path, num_bytes: int, setting: str = "TOKENMILL_HOME") -> None:
    """Raise CapacityError unless the disk of an existing `folder` has `num_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise CapacityError(
            f"{folder} has {format_bytes(free)} free and {format_bytes(num_bytes)} are needed: "
            f"free some, or set {setting} to a folder on a larger disk"
        )


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that others see the old content or the new, and never a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}")
    with storage_errors(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def sync_dir(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def format_bytes(num_bytes: int) -> str:
    """`98.4 MB`: decimal units, as disks and networks are sold."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"

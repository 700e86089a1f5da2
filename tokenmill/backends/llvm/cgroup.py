"""What the control group that this process runs in, such as a container's, lets it use.

Version 1 and 2 of Linux control groups; limits of every group up to the root count. On other
systems nothing is found, and nothing is limited. `root` stands for / in tests.
"""

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def memory_left_bytes(root: Path = _ROOT) -> int | None:
    """Limit less usage, file cache that can be dropped not counted; None without a limit."""
    v2 = [
        _memory_left(group, "memory.max", "memory.current", "inactive_file")
        for group in _groups("", root)
    ]
    v1 = [
        _memory_left(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        for group in _groups("memory", root)
    ]
    return min((left for left in v2 + v1 if left is not None), default=None)


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Processors' worth of time that the group may use; None without a limit."""
    v2 = [_quota(*_words(group / "cpu.max", 2)) for group in _groups("", root)]
    v1 = [
        _quota(*_words(group / "cpu.cfs_quota_us", 1), *_words(group / "cpu.cfs_period_us", 1))
        for group in _groups("cpu", root)
    ]
    return min((quota for quota in v2 + v1 if quota is not None), default=None)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of our group and its parents; "" is the single tree of version 2."""
    path = _group_path(controller, root)
    if path is None:
        return
    mounts = root / "sys/fs/cgroup"
    mount = mounts / controller if controller else mounts
    # A container may see a path of the host here that its own mount does not have.
    group = mount / path.strip("/")
    while group != mount and mount in group.parents:
        yield group
        group = group.parent
    yield mount


def _group_path(controller: str, root: Path) -> str | None:
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return None


def _memory_left(group: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    words = _words(group / limit, 1) + _words(group / usage, 1)
    if len(words) != 2 or not all(word.isdigit() for word in words):
        return None
    stat = dict(line.split() for line in _text(group / "memory.stat").splitlines())
    return max(0, int(words[0]) - int(words[1]) + int(stat.get(reclaimable, 0)))


def _quota(time_us: str = "", period_us: str = "") -> float | None:
    """Version 2 says "max" for no limit, version 1 a negative number."""
    return int(time_us) / int(period_us) if time_us.isdigit() and period_us.isdigit() else None


def _words(path: Path, at_most: int) -> list[str]:
    return _text(path).split()[:at_most]


def _text(path: Path) -> str:
    """The file's text; a group without this limit has no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""

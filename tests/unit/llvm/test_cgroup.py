from pathlib import Path

import pytest

from tokenmill.backends.llvm import workers
from tokenmill.backends.llvm.cgroup import cpu_quota


def write(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "250000 100000\n"}, 2.5),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 0.5),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/j\n",
                "sys/fs/cgroup/cpu/j/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/j/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_processor_quota(tmp_path, files, expected):
    assert cpu_quota(write(tmp_path, files)) == expected


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (2.9, 2), (0.3, 1), (64.0, 8)])
def test_usable_threads(monkeypatch, quota, expected):
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(workers.cgroup, "cpu_quota", lambda: quota)
    assert workers.num_usable_threads() == expected

import re
from pathlib import Path

import numpy as np
import pytest

from tokenmill.backends.llvm.memory import ALIGNMENT, Arena, memory_available_bytes
from tokenmill.errors import CapacityError


@pytest.mark.parametrize("huge", [True, False])
def test_memory_is_zeroed_aligned_and_shared_with_its_views(huge):
    arena = Arena(3 << 20, huge=huge)
    assert arena.address % ALIGNMENT == 0
    words = arena.view(np.int32, (4, 5), offset=64)
    assert not words.any()
    assert words.ctypes.data == arena.address + 64
    words[2, 3] = 7
    assert arena.view(np.int32, (20,), offset=64)[13] == 7
    arena.buffer(64 + 13 * 4, 4)[:] = bytes(4)
    assert words[2, 3] == 0


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_linux_may_give_it_huge_pages_whatever_it_does_with_shared_memory():
    arena = Arena(4 << 20)
    for mapping in re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.M):
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", mapping)
        if found and int(found[1], 16) <= arena.address < int(found[2], 16):
            flags = mapping.partition("VmFlags:")[2].split()
            assert "hg" in flags  # advised
            assert "sh" not in flags  # private
            return
    raise AssertionError("the arena is mapped nowhere")


def test_a_view_outlives_close():
    arena = Arena(4096)
    array = arena.view(np.uint8, (4096,))
    arena.close()
    arena.close()
    array[:] = 3
    assert array.sum() == 3 * 4096
    with pytest.raises(ValueError, match="closed"):
        arena.view(np.uint8, (1,))


@pytest.mark.parametrize(("offset", "count"), [(0, 1025), (4, 1024), (-4, 1)])
def test_views_stay_inside(offset, count):
    with pytest.raises(ValueError, match="arena"):
        Arena(4096).view(np.float32, (count,), offset=offset)


def test_an_empty_view():
    assert Arena(64).view(np.float32, (0, 3)).shape == (0, 3)


@pytest.mark.parametrize("size_bytes", [1 << 50, 1 << 70])
def test_too_much_memory_is_refused_in_plain_words(size_bytes):
    with pytest.raises(CapacityError, match=r"GiB of memory are needed .* GiB are left: choose"):
        Arena(size_bytes)


@pytest.fixture
def host(tmp_path: Path):
    """A fake / with 8 GiB available; call it to add files."""

    def write(path: str, text: str) -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return tmp_path

    write("proc/meminfo", "MemTotal: 99999999 kB\nMemAvailable:    8388608 kB\n")
    return write


GIB = 1 << 30


def test_without_a_control_group_the_machine_decides(host):
    assert memory_available_bytes(host("proc/self/cgroup", "0::/\n")) == 8 * GIB


def test_version_2_limit_less_usage_with_file_cache_given_back(host):
    host("proc/self/cgroup", "0::/user/job\n")
    host("sys/fs/cgroup/user/job/memory.max", f"{4 * GIB}\n")
    host("sys/fs/cgroup/user/job/memory.current", f"{3 * GIB}\n")
    root = host("sys/fs/cgroup/user/job/memory.stat", f"anon {2 * GIB}\ninactive_file {GIB}\n")
    assert memory_available_bytes(root) == 2 * GIB


def test_the_tightest_parent_counts(host):
    host("proc/self/cgroup", "0::/user/job\n")
    host("sys/fs/cgroup/user/job/memory.max", "max\n")
    host("sys/fs/cgroup/user/job/memory.current", "0\n")
    host("sys/fs/cgroup/user/memory.max", f"{GIB}\n")
    root = host("sys/fs/cgroup/user/memory.current", "24\n")
    assert memory_available_bytes(root) == GIB - 24


def test_version_1(host):
    host("proc/self/cgroup", "12:memory:/docker/abc\n3:cpu,cpuacct:/\n0::/\n")
    host("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", f"{2 * GIB}\n")
    root = host("sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes", f"{GIB}\n")
    assert memory_available_bytes(root) == GIB


def test_version_1_unlimited(host):
    host("proc/self/cgroup", "12:memory:/\n")
    host("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    root = host("sys/fs/cgroup/memory/memory.usage_in_bytes", f"{GIB}\n")
    assert memory_available_bytes(root) == 8 * GIB


def test_a_container_that_sees_its_group_as_the_root(host):
    host("proc/self/cgroup", "0::/../../elsewhere/pod\n")
    host("sys/fs/cgroup/memory.max", f"{GIB}\n")
    root = host("sys/fs/cgroup/memory.current", f"{2 * GIB}\n")
    assert memory_available_bytes(root) == 0

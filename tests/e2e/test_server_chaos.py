"""Bad company leaves no trace: no leak, and nobody's answer changes."""

import asyncio
import time
from pathlib import Path

import pytest

from tests.e2e.chaos import num_open_files, resident_bytes, run_chaos
from tests.e2e.server_process import serving

_GROWTH_BYTES = 16 * 2**20
"""The allocator keeps some of what was once in use; a full run was seen to take half a MiB."""

_MAX_BODY_BYTES = 2**20


@pytest.mark.parametrize(
    "num_requests", [120, pytest.param(2000, marks=pytest.mark.slow)], ids=["short", "full"]
)
def test_chaos(smollm2: Path, warm_home: Path, num_requests: int) -> None:
    # A small pool: there is preemption and eviction, and its pages are soon all touched.
    flags = ("--max-model-len", "1024", "--kv-cache-memory-bytes", f"{40 * 2**20}")
    flags += ("--max-body-bytes", f"{_MAX_BODY_BYTES}")
    with serving(smollm2, warm_home, *flags) as server:
        huge_bytes = _MAX_BODY_BYTES + 2**17
        asyncio.run(run_chaos(server.url, 120, huge_bytes=huge_bytes))
        pid = server.process.pid
        num_files, num_bytes = num_open_files(pid), resident_bytes(pid)
        chaos = asyncio.run(run_chaos(server.url, num_requests, seed=1, huge_bytes=huge_bytes))
        assert chaos.failures == []
        assert len(chaos.counts) == 8
        give_up_s = time.monotonic() + 10
        while num_open_files(pid) > num_files:
            assert time.monotonic() < give_up_s, "files stay open"
            time.sleep(0.05)
        num_grown = resident_bytes(pid) - num_bytes
        print(f"grown by {num_grown / 2**20:.1f} MiB")
        assert num_grown < _GROWTH_BYTES
        assert server.terminate() == 0
        assert not any("Traceback" in line for line in server.lines)

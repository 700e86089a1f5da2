"""Measured against simulated: two network namespaces of two ranks, 1 Gbit/s and 1 ms between them.

The namespaces are joined by TUN devices and a process that delays each packet and lets as many
through as the line would, since not every kernel has netem. Constants of the simulator are fitted
from ping-pong alone: between two ranks of a host, and between hosts. Needs root, and namespaces.
"""

import argparse
import ctypes
import fcntl
import heapq
import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tokenmill.collectives.communicator import Communicator
from tokenmill.collectives.connect import connect
from tokenmill.collectives.fit import fit_link
from tokenmill.collectives.measure import measure_call
from tokenmill.collectives.program import Plan
from tokenmill.collectives.simulate import simulate
from tokenmill.collectives.task import Task
from tokenmill.collectives.topology import Link, Links, Topology

PLANS = {
    "flat ring": Plan(algorithm="ring", hosts=2),
    "interleaved ring": Plan(algorithm="ring", hosts=2, order=(0, 2, 1, 3)),
    "hierarchical": Plan(algorithm="hierarchical", hosts=2),
    "tree": Plan(algorithm="tree", hosts=2),
}
SIZES = (64, 1 << 16, 1 << 24)
LIMIT = 0.35
RATE_BYTES_S = 1e9 / 8
DELAY_S = 1e-3
_MTU = 32768
_PING_SIZES = (64, 1 << 12, 1 << 16, 1 << 20, 1 << 22)
_OTHER = "tokenmill-other"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        print(json.dumps(run_rank(args.rank)))
        return
    rows = run_inside() if args.inside else run()
    if args.inside:
        print(json.dumps(rows))
        return
    print(describe_links(rows[0]["links"]))
    for row in rows:
        print(describe(row))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(abs(row["measured_s"] / row["simulated_s"] - 1) > LIMIT for row in rows))


def why_not() -> str | None:
    """Why this cannot run here; None if it can."""
    tun = Path("/dev/net/tun")
    probe = "mount -t tmpfs none /run && ip netns add probe"
    if not tun.exists():
        return f"there is no {tun}"
    try:
        done = subprocess.run(
            ["unshare", "-n", "-m", "sh", "-c", probe], capture_output=True, text=True
        )
    except FileNotFoundError:
        return "there is no unshare"
    return f"no namespaces: {done.stderr.strip()}" if done.returncode else None


def describe(row: dict[str, Any]) -> str:
    ratio = row["measured_s"] / row["simulated_s"]
    return (
        f"{row['plan']:17} {row['num_bytes']:9d} bytes  measured {row['measured_s'] * 1e3:8.3f} ms"
        f"  simulated {row['simulated_s'] * 1e3:8.3f} ms  ratio {ratio:.2f}"
    )


def describe_links(links: dict[str, Any]) -> str:
    return "ping-pong: " + "; ".join(
        f"{name} {links[name]['alpha_s'] * 1e6:.0f} us"
        f" and {1e-6 / links[name]['beta_s_per_byte']:.0f} MB/s"
        for name in ("local", "remote")
    )


def run() -> list[dict[str, Any]]:
    """All rows, from a namespace of their own, which ends with the process."""
    command = ["unshare", "-n", "-m", sys.executable, __file__, "--inside"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=_environment()
    )
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


def run_inside() -> list[dict[str, Any]]:
    for command in (
        "mount -t tmpfs none /run",
        f"ip netns add {_OTHER}",
        "ip link set lo up",
        f"ip -n {_OTHER} link set lo up",
    ):
        subprocess.run(command.split(), check=True)
    near, far = make_tun(None), make_tun(f"/run/netns/{_OTHER}")
    for where, own in ((["ip"], "10.77.0.1"), (["ip", "-n", _OTHER], "10.77.0.2")):
        peer = "10.77.0.2" if own.endswith("1") else "10.77.0.1"
        subprocess.run([*where, "addr", "add", own, "peer", peer, "dev", "line"], check=True)
        subprocess.run([*where, "link", "set", "line", "mtu", str(_MTU), "up"], check=True)
    threading.Thread(target=relay, args=(near, far), daemon=True).start()
    enter = ["ip", "netns", "exec", _OTHER]
    ranks = [
        subprocess.Popen(
            [*(enter if rank > 1 else []), sys.executable, __file__, "--rank", str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    rows: list[dict[str, Any]] = json.loads(said[0])
    return rows


def make_tun(namespace: str | None) -> int:
    """A TUN device `line` in a namespace; the handle works from everywhere."""
    made: list[int] = []

    def make() -> None:
        if namespace:
            with open(namespace) as handle:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(handle.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", b"line", _IFF_TUN | _IFF_NO_PI))
        made.append(tun)

    thread = threading.Thread(target=make)  # setns concerns one thread
    thread.start()
    thread.join()
    return made[0]


def relay(near: int, far: int) -> None:
    """Carry packets both ways, each DELAY_S after the line has had time for it.

    A line does not wait for the processors of the hosts that it joins, so nor must this thread.
    """
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    other, free_s = {near: far, far: near}, {near: 0.0, far: 0.0}
    under_way: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        timeout_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select([near, far], [], [], timeout_s)
        now_s = time.monotonic()
        for source in ready:
            packet = os.read(source, 65536)
            free_s[source] = max(now_s, free_s[source]) + len(packet) / RATE_BYTES_S
            number += 1
            heapq.heappush(under_way, (free_s[source] + DELAY_S, number, other[source], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(under_way)
            os.write(target, packet)


def run_rank(rank: int) -> list[dict[str, Any]]:
    """One rank: ping-pong, then every plan at every size. Rank 0 has the rows."""
    with connect(
        "10.77.0.1:29500", rank=rank, size=4, host_id="ab"[rank // 2], timeout_s=60
    ) as ranks:
        links = fit_links(ranks)
        topology = Topology(ranks=4, hosts=2, links=links)
        rows: list[dict[str, Any]] = []
        for name, plan in PLANS.items():
            for num_bytes in SIZES:
                task = Task(op="all_reduce", ranks=4, count=num_bytes // 4)
                rows.append(
                    {
                        "plan": name,
                        "num_bytes": num_bytes,
                        "measured_s": time_all_reduce(ranks, plan, num_bytes),
                        "simulated_s": simulate(task, plan, topology, num_bytes).time_s,
                        "links": asdict(links),
                    }
                )
        return rows


def time_all_reduce(ranks: Communicator, plan: Plan, num_bytes: int) -> float:
    """Seconds a call, of calls one after the other, as is usual; none can overtake another."""
    data = np.zeros(num_bytes // 4, np.float32)
    return time_call(ranks, lambda: ranks.all_reduce(data, plan=plan), num_bytes)


def time_call(ranks: Communicator, call: Callable[[], object], num_bytes: int) -> float:
    """What constants are fitted from and what they are held against is measured in one way."""
    num_iters = 10 if num_bytes <= 1 << 16 else 2
    return measure_call(ranks, call, 0, num_iters=num_iters, num_rounds=4).time_s


def fit_links(ranks: Communicator) -> Links:
    """Constants of both kinds of link, the same on all ranks."""
    found = np.zeros(4)
    for index, peer in enumerate((1, 2)):
        link = fit_link([(size, ping_pong(ranks, peer, size)) for size in _PING_SIZES])
        found[2 * index : 2 * index + 2] = link.alpha_s, link.beta_s_per_byte
    ranks.broadcast(found)
    local_alpha_s, local_beta, remote_alpha_s, remote_beta = map(float, found)
    return Links(
        local=Link(alpha_s=local_alpha_s, beta_s_per_byte=local_beta),
        # What is on the line does not keep the next message from leaving; handling it does.
        remote=Link(alpha_s=remote_alpha_s, beta_s_per_byte=remote_beta, gap_s=local_alpha_s),
        uplinks=1,
    )


def ping_pong(ranks: Communicator, peer: int, num_bytes: int) -> float:
    """Half a round trip between rank 0 and a peer; the others wait."""
    data = np.zeros(num_bytes, np.uint8)

    def go_and_return() -> None:
        if ranks.rank == 0:
            ranks.send(data, peer)
            ranks.recv(data, peer)
        elif ranks.rank == peer:
            ranks.recv(data, 0)
            ranks.send(data, 0)

    return time_call(ranks, go_and_return, num_bytes) / 2


if __name__ == "__main__":
    main()

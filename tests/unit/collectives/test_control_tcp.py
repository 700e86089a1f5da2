"""The meeting place: values, news of failure and of the end, and strangers who knock."""

import json
import socket
import struct
import threading
import time

import pytest

from tokenmill.collectives.control import ENDED, LEFT, get_all, put_own
from tokenmill.collectives.control_tcp import (
    ControlServer,
    TcpControl,
    own_address,
    parse_address,
)
from tokenmill.errors import CollectiveError, UsageError


@pytest.fixture
def server():
    return ControlServer(("127.0.0.1", 0), 2, 5.0)


def join(server, rank, size=2, timeout_s=5.0):
    return TcpControl(
        server.address,
        rank=rank,
        size=size,
        timeout_s=timeout_s,
        server=server if rank == 0 else None,
    )


def join_both(server):
    made = [None, None]

    def second():
        made[1] = join(server, 1)

    thread = threading.Thread(target=second, daemon=True)
    thread.start()
    made[0] = join(server, 0)
    thread.join(5)
    return made


def wait_for(check):
    deadline_s = time.monotonic() + 5
    while not check():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_values_reach_all_and_leaving_is_told(server):
    zero, one = join_both(server)
    put_own(one, "place", "here")
    put_own(zero, "place", "there")
    assert get_all(zero, "place", 5) == ["there", "here"]
    assert get_all(one, "place", 5) == ["there", "here"]
    one.close()
    wait_for(lambda: zero.notices().gone)
    assert zero.notices().gone == {1: LEFT}
    assert zero.notices().failure is None
    zero.close()


def test_a_failure_is_told_to_the_others_alone(server):
    zero, one = join_both(server)
    one.abort("rank 1 gave up: no reason")
    wait_for(lambda: zero.notices().failure)
    assert zero.notices().failure == "rank 1 gave up: no reason"
    assert one.notices().failure is None
    with pytest.raises(CollectiveError, match=r"^rank 0: rank 1 gave up: no reason$"):
        zero.get("place/1", 5)
    one.close()
    zero.close()


def test_a_connection_that_breaks_is_the_end_of_a_rank(server):
    zero, one = join_both(server)
    one._connection.shutdown(socket.SHUT_RDWR)
    wait_for(lambda: zero.notices().gone)
    assert zero.notices().gone == {1: ENDED}
    with pytest.raises(CollectiveError, match="rank 1 has ended before it published its place"):
        zero.get("place/1", 5)
    zero.close()


def test_a_value_that_does_not_come(server):
    zero, one = join_both(server)
    with pytest.raises(CollectiveError, match=r"rank 1 has not published its place within 0.05 s"):
        zero.get("place/1", 0.05)
    one.close()
    zero.close()


@pytest.mark.parametrize(
    ("rank", "size", "text"),
    [
        (1, 3, "rank 1 came with world size 3, but rank 0 has 2"),
        (2, 2, "rank 2 came, but ranks are 0 to 1"),
    ],
)
def test_a_rank_that_does_not_belong(server, rank, size, text):
    with pytest.raises(CollectiveError, match=f"^rank {rank}: {text}$"):
        join(server, rank, size)


def test_two_with_one_rank(server):
    said = []

    def first():
        with pytest.raises(CollectiveError) as failed:
            join(server, 1)
        said.append(str(failed.value))

    thread = threading.Thread(target=first, daemon=True)
    thread.start()
    wait_for(lambda: server._joined)
    with pytest.raises(CollectiveError, match=r"^rank 1: two processes came as rank 1$"):
        join(server, 1)
    thread.join(5)
    assert said == ["rank 1: two processes came as rank 1"]


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<I", 1 << 30),
        struct.pack("<I", 2) + b"{}",
        struct.pack("<I", 3) + b"\xff\xfe\xfd",
        struct.pack("<I", 2) + b"[]",
        struct.pack("<I", 5) + b"[[1]]",
        *(
            struct.pack("<I", len(text)) + text
            for text in (
                json.dumps(["put", "place/1", "a stranger's"]).encode(),
                json.dumps(["join", "another version", 1, 2]).encode(),
                json.dumps(["join", "tokenmill control 1", "one", 2]).encode(),
                json.dumps(["join"]).encode(),
            )
        ),
    ],
)
def test_strangers_are_turned_away_and_do_no_harm(server, data):
    with socket.create_connection(server.address, timeout=5) as stranger:
        stranger.sendall(data)
        stranger.settimeout(5)
        assert stranger.recv(1) == b""
    zero, one = join_both(server)
    put_own(one, "place", "here")
    assert zero.get("place/1", 5) == "here"
    one.close()
    zero.close()


def test_a_server_that_is_no_rank_0():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = other.getsockname()[:2]

        def hang_up():
            other.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        with pytest.raises(CollectiveError, match=r"ended the connection: is it rank 0\?"):
            TcpControl(address, rank=1, size=2, timeout_s=5)


@pytest.mark.parametrize("text", ["", "host", ":1", "host:", "host:port", "host:65536", "host:-1"])
def test_what_is_no_address(text):
    with pytest.raises(UsageError, match=r"must be like 127.0.0.1:29500"):
        parse_address(text)


def test_addresses():
    assert parse_address("node7:29500") == ("node7", 29500)
    assert parse_address("[::1]:80") == ("::1", 80)
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert own_address("no such host.invalid") == "127.0.0.1"
    socket.inet_aton(own_address())

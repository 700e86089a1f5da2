import asyncio
from itertools import pairwise

import pytest
from fake_openai import FakeServer, running
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.errors import UsageError
from tokenmill.loadgen.http import HttpClient, parse_base_url
from tokenmill.loadgen.response import ExchangeError, Response

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Y: a: b\r\n\r\n"
    b"5\r\nhello\r\n7;ext=1\r\n, world\r\n0\r\nTrailer: x\r\n\r\n"
)
PLAIN = b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\nConnection: close\r\n\r\ngone"
UNTIL_CLOSE = b"HTTP/1.0 200 OK\r\n\r\nall of it"


def feed(data, cuts=()):
    response, body = Response(), b""
    places = [0, *sorted(cuts), len(data)]
    for start, end in pairwise(places):
        body += b"".join(response.feed(data[start:end]))
    return response, body


@given(st.lists(st.integers(0, len(CHUNKED)), max_size=12))
def test_chunks_are_joined_wherever_the_network_cuts(cuts):
    response, body = feed(CHUNKED, cuts)
    assert body == b"hello, world"
    assert response.is_complete
    assert response.keeps_alive
    assert response.headers["x-y"] == "a: b"


@given(st.lists(st.integers(0, len(PLAIN)), max_size=12))
def test_a_body_of_known_length(cuts):
    response, body = feed(PLAIN, cuts)
    assert (response.status, body, response.is_complete) == (404, b"gone", True)
    assert not response.keeps_alive


def test_a_body_that_ends_with_the_connection():
    response, body = feed(UNTIL_CLOSE)
    assert (body, response.is_complete) == (b"all of it", False)
    response.end()
    assert response.is_complete
    assert not response.keeps_alive


def test_an_interim_answer_is_passed_over():
    response, body = feed(b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN)
    assert (response.status, body) == (404, b"gone")


@pytest.mark.parametrize("data", [b"SSH-2.0-x\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1" * 10_000])
def test_what_is_no_http_is_refused(data):
    with pytest.raises(ExchangeError, match=r"HTTP/1\.1"):
        feed(data)


def test_a_broken_chunk_is_refused():
    with pytest.raises(ExchangeError, match="broken chunk"):
        feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")


@pytest.mark.parametrize(("data", "when"), [(CHUNKED[:-9], "middle"), (b"", "before")])
def test_an_answer_that_breaks_off_is_no_answer(data, when):
    response, _ = feed(data)
    with pytest.raises(ExchangeError, match=when):
        response.end()


def test_addresses():
    address = parse_base_url("http://[::1]:80/x/v1/")
    assert (address.host, address.port, address.prefix) == ("::1", 80, "/x")
    assert address.authority == "[::1]:80"
    assert parse_base_url("https://h").port == 443


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:99999", ""])
def test_bad_addresses_are_refused(url):
    with pytest.raises(UsageError, match="--base-url"):
        parse_base_url(url)


def get(client, path="/v1/models"):
    body = bytearray()
    return client.request("GET", path, None, lambda data, _: body.extend(data)), body


@pytest.mark.parametrize(("closes", "expected"), [(False, 1), (True, 3)])
def test_a_connection_serves_as_many_requests_as_the_server_lets_it(closes, expected):
    async def ask(url):
        client = HttpClient(parse_base_url(url), {}, timeout_s=10)
        for _ in range(3):
            request, body = get(client)
            assert (await request).status == 200
            assert b"fake-model" in body
            await asyncio.sleep(0.01)
        client.close()

    with running(FakeServer(closes=closes)) as server:
        asyncio.run(ask(server.url))
        assert server.num_connections == expected


def test_nobody_listens():
    async def ask():
        request, _ = get(HttpClient(parse_base_url("http://127.0.0.1:1"), {}, timeout_s=10))
        await request

    with pytest.raises(ExchangeError, match="cannot connect: connection refused"):
        asyncio.run(ask())

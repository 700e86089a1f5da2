"""Pieces over a library's messages: sizes, buffers, goodbyes, and a library that loses a peer."""

from collections import deque

import numpy as np
import pytest

from tokenmill.collectives.transports.messages import (
    PIECE_BYTES,
    MessageChannel,
    MessageTransport,
    PeerLostError,
)
from tokenmill.collectives.transports.wire import HEADER, HEADER_BYTES

CALL = bytes(range(28))


class FakeMessage:
    def __init__(self, line, message):
        self.line, self.message, self.has_met = line, message, False

    def is_done(self):
        if self.line.is_lost:
            raise PeerLostError("lost")
        self.line.match()
        return self.has_met


class FakeLine:
    """One direction: a send is done when its receive has come, as with the strictest library."""

    def __init__(self):
        self.sends, self.receives = deque(), deque()
        self.is_lost = False

    def match(self):
        while self.sends and self.receives:
            send, receive = self.sends.popleft(), self.receives.popleft()
            assert send.message.size == receive.message.size
            receive.message[:] = send.message
            send.has_met = receive.has_met = True


class FakeLink:
    def __init__(self, there, back):
        self.there, self.back, self.is_closed = there, back, False

    def isend(self, message):
        self.there.sends.append(FakeMessage(self.there, message))
        return self.there.sends[-1]

    def irecv(self, message):
        self.back.receives.append(FakeMessage(self.back, message))
        return self.back.receives[-1]

    def close(self):
        self.is_closed = True


@pytest.fixture
def lines():
    return FakeLine(), FakeLine()


@pytest.fixture
def channels(lines):
    there, back = lines
    return MessageChannel(FakeLink(there, back)), MessageChannel(FakeLink(back, there))


def send(channel, payload, tag=0):
    header = HEADER.pack(CALL, tag, payload.size, payload.size)
    return channel.try_send(header, payload)


def numbers(count):
    return np.arange(count, dtype=np.uint32).astype(np.uint8)


@pytest.mark.parametrize(
    "size", [1, 4096 - HEADER_BYTES, 4097 - HEADER_BYTES, 4096, PIECE_BYTES - 1, PIECE_BYTES]
)
def test_pieces_of_any_size(channels, size):
    one, other = channels
    for tag in range(5):
        assert send(one, numbers(size) ^ tag, tag)
        piece = other.poll()
        assert (piece.call, piece.tag, piece.message_bytes) == (CALL, tag, size)
        np.testing.assert_array_equal(piece.payload, numbers(size) ^ tag)
        assert other.poll() is piece
        other.release()
    assert one.flush()
    assert other.poll() is None


def test_two_pieces_may_be_under_way(channels):
    one, other = channels
    assert send(one, numbers(10_000), 0)
    assert send(one, numbers(10), 1)
    assert not send(one, numbers(10), 2)
    assert not one.flush()
    assert not one.has_sent_some()
    assert other.poll().tag == 0
    assert one.has_sent_some()
    assert send(one, numbers(10), 2)
    other.release()
    assert [(other.poll().tag, other.release()) for _ in range(2)] == [(1, None), (2, None)]
    assert one.flush()


def test_what_comes_next_does_not_harm_the_piece_in_hand(channels):
    one, other = channels
    send(one, numbers(5000), 0)
    piece = other.poll()
    send(one, numbers(5000) ^ 255, 1)
    one.flush()
    np.testing.assert_array_equal(piece.payload, numbers(5000))
    other.release()
    np.testing.assert_array_equal(other.poll().payload, numbers(5000) ^ 255)


def test_a_goodbye_ends_a_channel_after_what_came_before(channels):
    one, other = channels
    send(one, numbers(7))
    one.say_goodbye()
    assert not other.is_at_end(False)
    assert other.poll() is not None
    assert not other.is_at_end(True)
    other.release()
    assert other.poll() is None
    assert other.is_at_end(False)


def test_a_peer_that_the_library_loses(channels, lines):
    one, other = channels
    send(one, numbers(7))
    assert other.poll() is not None
    lines[0].is_lost = lines[1].is_lost = True
    assert not other.is_at_end(True), "a piece is there"
    other.release()
    assert other.poll() is None
    assert other.can_receive(), "there is something to find out"
    assert other.is_at_end(False)
    send(one, numbers(7))
    assert one.flush()


def test_a_piece_that_is_too_long(channels):
    one, other = channels
    header = HEADER.pack(CALL, 0, 1 << 30, PIECE_BYTES + 1)
    one.try_send(header, numbers(10))
    assert other.can_receive()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"a piece of {PIECE_BYTES + 1} bytes"):
            other.poll()


def test_transports_part_when_both_have_said_goodbye(lines):
    there, back = lines
    links = FakeLink(there, back), FakeLink(back, there)
    waited = []

    def wait_for(checks, attempt):
        waited.append(attempt)
        if attempt == 1:
            late = MessageChannel(links[1])
            late.say_goodbye()
            assert late.has_parted()

    MessageTransport("fake", {1: links[0]}, wait_for).close()
    assert links[0].is_closed
    assert waited == [0, 1]

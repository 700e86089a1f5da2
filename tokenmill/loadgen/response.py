"""An HTTP/1.1 response, read as its bytes come; knows no sockets."""

from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_HEAD_BYTES = 1 << 16


class ExchangeError(Exception):
    """A request got no whole answer; the message says why, in a few words."""


@dataclass
class Response:
    """An answer, fed piece by piece as it comes from the socket.

    Without `Content-Length` and chunks, the body ends where the connection does.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)  # names in lower case
    is_complete: bool = False

    _pending: bytes = b""
    _has_head: bool = False
    _is_chunked: bool = False
    _num_left: int | None = None  # bytes of the body, or of the chunk; None: until the end
    _phase: str = "size"  # of a chunk: size, data, end, trailer

    @property
    def keeps_alive(self) -> bool:
        """Can the connection serve another request?"""
        is_framed = self._is_chunked or self._num_left is not None
        return is_framed and self.headers.get("connection", "").lower() != "close"

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The pieces of the body in what the socket gave. Raises ExchangeError."""
        self._pending = self._pending + data if self._pending else data
        if not self._has_head and not self._read_head():
            return
        if self._is_chunked:
            yield from self._read_chunks()
        else:
            yield from self._read_plain()

    def end(self) -> None:
        """The connection is closed. Raises ExchangeError if more was to come."""
        if self._has_head and not self._is_chunked and self._num_left is None:
            self.is_complete = True
        if not self.is_complete:
            what = "in the middle of" if self._has_head else "before"
            raise ExchangeError(f"the server closed the connection {what} its answer")

    def _read_head(self) -> bool:
        while not self._has_head:
            head, separator, rest = self._pending.partition(b"\r\n\r\n")
            if len(head) > MAX_HEAD_BYTES or not b"HTTP/".startswith(head[:5]):
                raise ExchangeError("the server does not speak HTTP/1.1")
            if not separator:
                return False
            self._pending = rest
            self._parse_head(head)
        return True

    def _parse_head(self, head: bytes) -> None:
        status_line, *lines = head.decode("latin-1").split("\r\n")
        words = status_line.split(maxsplit=2)
        if len(words) < 2 or not words[1].isdigit():
            raise ExchangeError("the server does not speak HTTP/1.1")
        self.status = int(words[1])
        if 100 <= self.status < 200:
            return  # an interim answer; the real one follows
        pairs = (line.partition(":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self._is_chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        length = self.headers.get("content-length", "")
        if length.isdigit():
            self._num_left = int(length)
        elif self.status in (204, 304):
            self._num_left = 0
        self._has_head = True

    def _read_plain(self) -> Iterator[bytes]:
        data, self._pending = self._pending, b""
        if self._num_left is not None:
            data = data[: self._num_left]
            self._num_left -= len(data)
            self.is_complete = self._num_left == 0
        if data:
            yield data

    def _read_chunks(self) -> Iterator[bytes]:
        while not self.is_complete:
            if self._phase == "data":
                if not self._pending:
                    return
                yield self._take_data()
                continue
            line, separator, rest = self._pending.partition(b"\r\n")
            if not separator:
                return
            self._pending = rest
            self._take_line(line)

    def _take_data(self) -> bytes:
        """As much of the chunk as is there."""
        assert self._num_left
        data = self._pending[: self._num_left]
        self._pending = self._pending[len(data) :]
        self._num_left -= len(data)
        if self._num_left == 0:
            self._phase = "end"
        return data

    def _take_line(self, line: bytes) -> None:
        if self._phase == "end":
            self._phase = "size"
        elif self._phase == "trailer":
            self.is_complete = not line
        else:
            try:
                self._num_left = int(line.partition(b";")[0], 16)
            except ValueError:
                raise ExchangeError("the server sent a broken chunk") from None
            self._phase = "data" if self._num_left else "trailer"

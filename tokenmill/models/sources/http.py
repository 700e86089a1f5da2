"""HTTP as far as a hub needs it: answers in JSON, and files that go on where they stopped.

urllib, because it comes with Python and follows the user's proxy and certificate settings. What
is secret goes to the hub alone, never along with a redirection to another host.
"""

import contextlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlencode, urlsplit

import tokenmill
from tokenmill.models.home import storage_errors

TIMEOUT_S = 30.0
"""For a connection, and for the next bytes of an answer."""
PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Before the next try of a download that had begun; the first is used again after new bytes."""
MAX_JSON_BYTES = 1 << 26
_CHUNK_BYTES = 1 << 20
_MAX_MESSAGE_CHARS = 300


class HttpError(Exception):
    """An answer that is a refusal (`status`), or no answer (None); the message is a short line."""

    def __init__(self, status: int | None, message: str) -> None:
        super().__init__(" ".join(message.split())[:_MAX_MESSAGE_CHARS])
        self.status = status

    @property
    def is_passing(self) -> bool:
        """Whether trying again may help."""
        return self.status is None or self.status == 429 or self.status >= 500


@dataclass(frozen=True, kw_only=True)
class Client:
    """`endpoint` is an address without a slash at its end; `secrets` are headers."""

    endpoint: str
    secrets: Mapping[str, str] = field(repr=False)

    def get_json(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        """The answer of the hub. Raises HttpError, also where it is no JSON."""
        with self._open(path, query or {}, {}) as answer, _network_errors():
            body = answer.read(MAX_JSON_BYTES)
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise HttpError(None, f"{path} is answered with something else than JSON") from error

    def download(
        self,
        path: str,
        query: Mapping[str, str],
        target: Path,
        size_bytes: int,
        tell: Callable[[int], None],
    ) -> None:
        """Append to `target` what it lacks of `size_bytes`; `tell` hears its size as it grows.

        A connection that breaks is made again as long as that brings more. Raises HttpError.
        """
        with storage_errors(target):
            target.touch()
        first_bytes = most_bytes = _size(target)
        num_idle = 0
        while _size(target) < size_bytes:
            try:
                self._continue(path, query, target, size_bytes, tell)
            except HttpError as error:
                num_idle = 0 if _size(target) > most_bytes else num_idle + 1
                most_bytes = max(most_bytes, _size(target))
                has_begun = most_bytes > first_bytes
                if not (error.is_passing and has_begun and num_idle < len(PAUSES_S)):
                    raise
                time.sleep(PAUSES_S[num_idle])

    def _continue(
        self,
        path: str,
        query: Mapping[str, str],
        target: Path,
        size_bytes: int,
        tell: Callable[[int], None],
    ) -> None:
        start = _size(target)
        extra = {"Range": f"bytes={start}-{size_bytes - 1}"} if start else {}
        with self._open(path, query, extra) as answer, storage_errors(target):
            if not _goes_on_from(answer, start):
                start = 0
            with open(target, "r+b") as file:
                file.truncate(start)
                file.seek(start)
                for num_bytes in _copy(answer, file, size_bytes - start):
                    start += num_bytes
                    tell(start)
                file.flush()
                os.fsync(file.fileno())

    @contextlib.contextmanager
    def _open(
        self, path: str, query: Mapping[str, str], extra: Mapping[str, str]
    ) -> Iterator[http.client.HTTPResponse]:
        address = f"{self.endpoint}{path}" + (f"?{urlencode(query)}" if query else "")
        agent = {"User-Agent": f"tokenmill/{tokenmill.__version__}"}
        request = urllib.request.Request(address, headers={**agent, **extra})
        _add_secrets(request, self.secrets)
        opener = urllib.request.build_opener(_Redirection(self.secrets))
        with _network_errors():
            answer = opener.open(request, timeout=TIMEOUT_S)
        with answer:
            yield answer


class _Redirection(urllib.request.HTTPRedirectHandler):
    """Follows, and shows the secrets only where they were shown before."""

    def __init__(self, secrets: Mapping[str, str]) -> None:
        self._secrets = secrets

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]:
            _add_secrets(request, self._secrets)
        return request


def _add_secrets(request: urllib.request.Request, secrets: Mapping[str, str]) -> None:
    for name, value in secrets.items():
        request.add_unredirected_header(name, value)


def _goes_on_from(answer: http.client.HTTPResponse, start: int) -> bool:
    """Whether the answer is what was asked for and not the whole file from its beginning."""
    content_range = answer.headers.get("Content-Range", "")
    return answer.status == 206 and content_range.startswith(f"bytes {start}-")


def _copy(answer: http.client.HTTPResponse, file: IO[bytes], left: int) -> Iterator[int]:
    """Write so many bytes and no more, whatever the server sends; yields those of each chunk."""
    while left:
        with _network_errors():
            chunk = answer.read(min(left, _CHUNK_BYTES))
        if not chunk:
            raise HttpError(None, "the connection ended early")
        file.write(chunk)
        left -= len(chunk)
        yield len(chunk)


def _size(path: Path) -> int:
    return path.stat().st_size


@contextlib.contextmanager
def _network_errors() -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        with error:
            raise HttpError(error.code, _message(error)) from error
    except urllib.error.URLError as error:
        raise HttpError(None, str(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise HttpError(None, str(error) or type(error).__name__) from error


def _message(error: urllib.error.HTTPError) -> str:
    """What the hub says about its refusal, or else what the number means."""
    with contextlib.suppress(OSError, ValueError, RecursionError, http.client.HTTPException):
        body = json.loads(error.read(MAX_JSON_BYTES))
        if isinstance(body, dict) and (text := body.get("Message")):
            return f"{error.code}: {text}"
    return f"{error.code} {error.reason}"

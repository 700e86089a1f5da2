"""The gate before all routes: who may pass, how much may come in, and the line in the log."""

import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenmill.engine.outputs import RequestOutput
from tokenmill.server.body import BoundedBody
from tokenmill.server.errors import ApiError, draining
from tokenmill.server.life import Life

log = logging.getLogger("tokenmill.access")

PROBES = frozenset(("/health", "/live", "/ready"))
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_GUARD_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


@dataclass
class Record:
    """What the log says of one request: never what was asked or answered."""

    request_id: str
    status: int = 0
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_output_tokens: int | None = None
    finish_reason: str | None = None
    error_code: str | None = None  # the message could quote what was asked
    error_param: str | None = None

    def note_error(self, error: ApiError) -> None:
        self.error_code = error.code or str(error.status_code)
        self.error_param = error.param

    def note(self, outputs: Sequence[RequestOutput]) -> None:
        """Add up what a call's requests used, as far as that is known."""
        if not outputs:
            return
        self.num_prompt_tokens = sum(output.num_prompt_tokens for output in outputs)
        self.num_cached_tokens = sum(output.num_cached_tokens for output in outputs)
        self.num_output_tokens = sum(output.num_output_tokens for output in outputs)
        reasons = {sample.finish_reason for output in outputs for sample in output.outputs}
        self.finish_reason = ",".join(sorted(reasons))


class Gate:
    """ASGI middleware: request id, API keys, limits of the body, draining, access log.

    A request is active, so that draining waits for it, once its body is there.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        life: Life,
        api_keys: Sequence[str],
        open_paths: frozenset[str],
        max_body_bytes: int,
        body_timeout_s: float,
    ) -> None:
        self._app = app
        self._life = life
        self._digests = [_digest(key.encode()) for key in api_keys]
        self._open_paths = open_paths | PROBES
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started_s = time.perf_counter()
        headers = Headers(scope=scope)
        record = Record(_request_id(headers))
        scope.setdefault("state", {})["record"] = record

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                marked = MutableHeaders(scope=message)
                marked["X-Request-Id"] = record.request_id
                for name, value in _GUARD_HEADERS.items():
                    marked.setdefault(name, value)
            await send(message)

        with ExitStack() as active:
            body = BoundedBody(
                receive,
                life=self._life,
                max_bytes=self._max_body_bytes,
                timeout_s=self._body_timeout_s,
                on_complete=lambda: active.enter_context(self._life.serving()),
            )
            try:
                if error := self._refusal(scope, headers, body):
                    record.note_error(error)
                    if error.status_code == 413:
                        await body.drop()
                    await error.response()(scope, receive, send_marked)
                elif _has_body(headers):
                    await self._app(scope, body, send_marked)
                else:
                    active.enter_context(self._life.serving())
                    await self._app(scope, receive, send_marked)
            finally:
                if body.is_gone:
                    record.status = 499
                _write(record, scope, time.perf_counter() - started_s)

    def _refusal(self, scope: Scope, headers: Headers, body: BoundedBody) -> ApiError | None:
        if self._digests and scope["path"] not in self._open_paths and not self._knows(headers):
            return ApiError(
                401,
                "the API key is missing or wrong: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._life.is_draining and scope["method"] == "POST":
            return draining()
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            return body.too_large()
        return None

    def _knows(self, headers: Headers) -> bool:
        """Compares with every key, whatever it is, so that time tells nothing about any."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode("latin-1"))
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches) and scheme.lower() == "bearer"


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _digest(data: bytes) -> bytes:
    """Of one length for keys of all lengths."""
    return hashlib.sha256(data).digest()


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex


def _write(record: Record, scope: Scope, seconds: float) -> None:
    client = scope.get("client")
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "request_id": record.request_id,
        "client": client[0] if client else None,
        "method": scope["method"],
        "path": scope["path"][:256],
        "status": record.status,
        "duration_ms": round(1000 * seconds, 1),
        "prompt_tokens": record.num_prompt_tokens,
        "cached_tokens": record.num_cached_tokens,
        "output_tokens": record.num_output_tokens,
        "finish_reason": record.finish_reason,
        "error": record.error_code,
        "param": record.error_param,
    }
    log.info(json.dumps({key: value for key, value in line.items() if value is not None}))

"""The server under load, as an OpenAI client sees it."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from tokenmill.errors import TokenmillError, UsageError
from tokenmill.loadgen.events import CompletionStream, error_message, shorten
from tokenmill.loadgen.http import HttpClient, parse_base_url
from tokenmill.loadgen.records import LoadRequest, RequestRecord
from tokenmill.loadgen.response import ExchangeError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
ENDPOINTS = (COMPLETIONS, CHAT)


class TargetError(TokenmillError):
    """The server cannot be reached, or refuses what every request would ask for."""


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """`model` None takes the first that the server lists. `temperature` None leaves it to the
    server; `extra_body` is added to every request."""

    base_url: str = "http://127.0.0.1:8000"
    endpoint: str = COMPLETIONS
    model: str | None = None
    api_key: str | None = None
    temperature: float | None = 0.0
    ignore_eos: bool = False
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        if self.endpoint not in ENDPOINTS:
            raise UsageError(f"--endpoint {self.endpoint!r} is none of {', '.join(ENDPOINTS)}")
        if not self.timeout_s > 0:
            raise UsageError(f"--request-timeout is {self.timeout_s:g}, but must be above 0")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UsageError("--api-key holds characters that no HTTP header can carry")


class Target:
    """Sends requests to one server. Close it inside the loop that it was used in, or use `with`."""

    def __init__(self, options: TargetOptions) -> None:
        self.options = options
        self.model = options.model or ""
        headers = {"Accept": "*/*"}
        if options.api_key is not None:
            headers["Authorization"] = f"Bearer {options.api_key}"
        self._http = HttpClient(
            parse_base_url(options.base_url), headers, timeout_s=options.timeout_s
        )

    async def find_model(self) -> str:
        """Ask the server for its models and settle on one. Raises TargetError.

        A server that has no list of models is asked for the one that was named.
        """
        status, body = await self._get("/v1/models")
        names = _model_names(body) if status == 200 else []
        if status in (401, 403):
            key = "this --api-key" if self.options.api_key else "a request without --api-key"
            raise TargetError(f"{self.options.base_url} refuses {key} (HTTP {status})")
        if self.model and names and self.model not in names:
            known = ", ".join(names[:8])
            raise TargetError(
                f"{self.options.base_url} has no model {self.model!r}: it has {known}"
            )
        if not self.model and not names:
            raise TargetError(
                f"{self.options.base_url}/v1/models lists no models (HTTP {status}): "
                "name one with --model"
            )
        self.model = self.model or names[0]
        return self.model

    async def send(self, request: LoadRequest, start_s: float) -> RequestRecord:
        """Send a request and read its stream to the end; a failure is part of the record.

        `start_s` is the start of the run, by `time.perf_counter`.
        """
        body = self._body(request)
        stream = CompletionStream()
        raw = bytearray()

        def receive(data: bytes, time_s: float) -> None:
            stream.receive(data, time_s)
            if not stream.times_s and len(raw) < 4096:
                raw.extend(data)  # what an error says

        sent_s = time.perf_counter()
        try:
            response = await self._http.request("POST", self.options.endpoint, body, receive)
            error = _status_error(response.status, bytes(raw)) or _stream_error(stream, bytes(raw))
        except ExchangeError as failed:
            error = str(failed)
        return _make_record(request, stream, error, sent_s, start_s)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _body(self, request: LoadRequest) -> bytes:
        options = self.options
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.output_len,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.endpoint == CHAT:
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        if options.temperature is not None:
            body["temperature"] = options.temperature
        if options.ignore_eos:
            body["ignore_eos"] = True
        return json.dumps({**body, **options.extra_body}).encode()

    async def _get(self, path: str) -> tuple[int, bytes]:
        raw = bytearray()
        try:
            response = await self._http.request("GET", path, None, lambda data, _: raw.extend(data))
        except ExchangeError as error:
            raise TargetError(
                f"{self.options.base_url}: {error}: is the server running, and is this its "
                "--base-url?"
            ) from error
        return response.status, bytes(raw)


def _model_names(body: bytes) -> list[str]:
    try:
        return [str(entry["id"]) for entry in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError):
        return []


def _status_error(status: int, body: bytes) -> str | None:
    """`HTTP 429: too many requests`; None where all is well."""
    if status == 200:
        return None
    try:
        document = json.loads(body)
        message = error_message(document) if isinstance(document, dict) else str(document)
    except ValueError:
        message = body.decode(errors="replace")
    return shorten(f"HTTP {status}: {message}".rstrip(": "))


def _stream_error(stream: CompletionStream, body: bytes) -> str | None:
    if stream.error is not None:
        return stream.error
    if stream.last_s is None:
        what = f": {shorten(body.decode(errors='replace'), 80)}" if body else ""
        return f"the answer is no stream of completion chunks{what}"
    return None if stream.is_finished else "the stream ended without a finish reason"


def _make_record(
    request: LoadRequest,
    stream: CompletionStream,
    error: str | None,
    sent_s: float,
    start_s: float,
) -> RequestRecord:
    """What the server counted goes before what we can tell."""
    num_prompt = stream.num_prompt_tokens
    num_output = stream.num_output_tokens
    last_s = time.perf_counter() if error or stream.last_s is None else stream.last_s
    return RequestRecord(
        started_s=sent_s - start_s,
        ended_s=last_s - start_s,
        prompt_len=request.prompt_len if num_prompt is None else num_prompt,
        output_len=len(stream.times_s) if num_output is None else num_output,
        token_times_s=[at - start_s for at in stream.times_s],
        text="".join(stream.texts),
        error=error,
    )

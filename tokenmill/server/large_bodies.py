"""Large JSON bodies, parsed beside the event loop without holding up what else runs.

A thread alone would not do: the standard library's parser keeps the interpreter's lock from the
first byte to the last, some 75 ms for each MB of numbers. Its parts that are written in Python
give way between two values, so that only strings are read in one piece (6 ms a MB).
"""

import json
from collections.abc import Awaitable, Callable
from json.decoder import JSONArray  # type: ignore[attr-defined]  # of the standard library itself
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from tokenmill.server.prompting import Encoder

LARGE = 2**16
"""Bytes of a body above which it is: up to here parsing takes a few ms, as a step does."""


class _YieldingDecoder(json.JSONDecoder):
    """Decodes as its parent does, values and errors, some five times slower."""

    def __init__(self) -> None:
        super().__init__()
        self.parse_array = JSONArray
        self.scan_once = py_make_scanner(self)


def parse_yielding(body: bytes) -> Any:
    """What `json.loads` gives or raises, in pieces that let other threads run."""
    return json.loads(body, cls=_YieldingDecoder)


def route_class(encoder: Encoder) -> type[APIRoute]:
    """Routes whose large bodies are parsed in the encoder's thread."""

    class LargeBodyRequest(Request):
        async def json(self) -> Any:
            body = await self.body()
            if len(body) <= LARGE:
                return json.loads(body)
            return await encoder.apart(lambda: parse_yielding(body), len(body))

    class LargeBodyRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
            handler = super().get_route_handler()

            async def handle(request: Request) -> Response:
                return await handler(LargeBodyRequest(request.scope, request.receive))

            return handle

    return LargeBodyRoute

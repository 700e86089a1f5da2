"""A request on its way: to the engine, and back as one JSON body or as a stream of events."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenmill.engine.outputs import OutputDelta, RequestOutput
from tokenmill.engine.request import Request
from tokenmill.server.access import Record
from tokenmill.server.bridge import Bridge, Call
from tokenmill.server.errors import ApiError, ClientGoneError
from tokenmill.server.pooling_requests import PooledBody
from tokenmill.server.prompting import Encoder
from tokenmill.server.requests import GenerationBody

DONE = b"data: [DONE]\n\n"
GONE = Response(status_code=499)
"""Nobody reads it; the log shows it."""


class Writer(Protocol):
    """Puts what the engine delivers into the words of one API."""

    def opening(self) -> str:
        """Events before the first delta."""
        ...

    def event(self, index: int, delta: OutputDelta) -> str:
        """The events of one delta of request `index`; "" where there is nothing to say."""
        ...

    def closing(self) -> str:
        """Events after the last delta."""
        ...

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The body of an answer that does not stream."""
        ...


def name_call(http: HttpRequest, body: GenerationBody | PooledBody) -> str:
    """The id of a call, in its answer and in the log: the body's, the header's or a new one."""
    record: Record = http.state.record
    record.request_id = body.request_id or record.request_id
    return record.request_id


async def answer(
    http: HttpRequest, bridge: Bridge, requests: list[Request], writer: Writer
) -> Response:
    """Submit requests and answer with what comes. Raises ApiError."""
    call = bridge.submit(requests)
    record: Record = http.state.record
    if requests[0].is_streaming:
        return EventStream(bridge, call, writer, record)
    outputs = await _wait(http, bridge, call)
    return GONE if outputs is None else _json(writer.whole(outputs))


async def answer_whole(
    http: HttpRequest,
    bridge: Bridge,
    requests: list[Request],
    encoder: Encoder,
    whole: Callable[[list[RequestOutput]], dict[str, Any]],
) -> Response:
    """The same for any number of requests of which none streams.

    They run in turn, and many numbers are written out beside the event loop.
    """
    outputs = await _wait(http, bridge, bridge.submit(requests, in_turn=True))
    if outputs is None:
        return GONE
    vectors = (output.pooled for output in outputs)
    size = sum(0 if vector is None else vector.size for vector in vectors)
    return await encoder.apart(lambda: _json(whole(outputs)), size)


async def _wait(http: HttpRequest, bridge: Bridge, call: Call) -> list[RequestOutput] | None:
    """All outputs of a call; None: the client hung up before."""
    record: Record = http.state.record
    gone = asyncio.create_task(_leave_with_client(http.receive, bridge, call))
    try:
        return await call.wait()
    except ClientGoneError:
        return None
    finally:
        gone.cancel()
        record.note(await bridge.leave(call))


def _json(body: dict[str, Any]) -> Response:
    return Response(json.dumps(body).encode(), 200, media_type="application/json")


class EventStream(Response):
    """Server-sent events. All events that one step of the engine makes leave in one piece."""

    media_type = "text/event-stream"

    def __init__(self, bridge: Bridge, call: Call, writer: Writer, record: Record) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._bridge = bridge
        self._call = call
        self._writer = writer
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_leave_with_client(receive, self._bridge, self._call))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self._events():
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGoneError:
            self._record.status = 499
        finally:
            gone.cancel()
            self._record.note(await self._bridge.leave(self._call))

    async def _events(self) -> AsyncIterator[bytes]:
        event = self._writer.event
        if opening := self._writer.opening():
            yield opening.encode()
        try:
            async for batch in self._call.deltas():
                if data := "".join([event(index, delta) for index, delta in batch]):
                    yield data.encode()
        except ApiError as error:
            self._record.note_error(error)
            yield f"data: {json.dumps(error.body())}\n\n".encode()
            return
        yield self._writer.closing().encode() + DONE


async def _leave_with_client(receive: Receive, bridge: Bridge, call: Call) -> None:
    """Wait until the client hangs up. The body has been read, so nothing else can come."""
    while (await receive())["type"] != "http.disconnect":
        pass
    bridge.abort(call)

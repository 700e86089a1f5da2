"""Between the engine's thread and the event loop: one hop a step, whatever the company."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from tokenmill.engine.engine import Engine
from tokenmill.engine.outputs import OutputDelta, RequestOutput
from tokenmill.engine.request import Delivery, EngineDeadError, Event, Request
from tokenmill.errors import TokenmillError
from tokenmill.server.errors import ClientGoneError, api_error_of, draining

Observe = Callable[[Request, Event], None]
"""Hears of every delta on the event loop, and of the engine's end."""


@dataclass(eq=False)
class Call:
    """The requests of one HTTP call, and what arrived for them; the event loop's own."""

    requests: list[Request]
    outputs: dict[int, RequestOutput] = field(default_factory=dict)
    _arrived: deque[tuple[int, OutputDelta]] = field(default_factory=deque)
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # nothing more will come
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _error: Exception | None = None

    @property
    def is_complete(self) -> bool:
        return len(self.outputs) == len(self.requests)

    async def deltas(self) -> AsyncIterator[list[tuple[int, OutputDelta]]]:
        """What arrived since, in batches: (index of the request, delta), until all have ended.

        Raises ClientGoneError once the client has hung up, ApiError where the engine gave up.
        """
        num_ended = 0
        while num_ended < len(self.requests):
            await self._wake.wait()
            self._wake.clear()
            if self._error is not None:
                raise self._error
            batch = list(self._arrived)
            self._arrived.clear()
            num_ended += sum(delta.output is not None for _, delta in batch)
            yield batch

    async def wait(self) -> list[RequestOutput]:
        """The outputs, in the order of the requests; raises what `deltas` raises."""
        async for _ in self.deltas():
            pass
        return [self.outputs[index] for index in range(len(self.requests))]

    def take(self, index: int, delta: OutputDelta) -> None:
        if delta.output is not None:
            self.outputs[index] = delta.output
            if self.is_complete:
                self.settled.set()
        if delta.finish_reason == "abort":
            return self.fail(draining())  # the client's own leaving has failed it already
        self._arrived.append((index, delta))
        self._wake.set()

    def fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._wake.set()


class Bridge:
    """Takes requests to the engine, and what the engine delivers to the calls that wait."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, observe: Observe) -> None:
        self.engine = engine
        self._loop = loop
        self._observe = observe
        self._live: dict[Request, tuple[Call, int]] = {}
        # One object: the engine calls each distinct sink once a step.
        self.sink = self._deliver

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    def submit(self, requests: list[Request], *, in_turn: bool = False) -> Call:
        """Hand requests to the engine together; raises ApiError where it refuses them.

        `in_turn` as `Engine.submit` has it.
        """
        call = Call(requests)
        try:
            self.engine.submit(requests, in_turn=in_turn)
        except (TokenmillError, EngineDeadError) as error:
            raise api_error_of(error) from error
        # Deliveries reach this thread through the loop, so they cannot overtake this line.
        self._live.update((request, (call, index)) for index, request in enumerate(requests))
        return call

    def abort(self, call: Call) -> None:
        """The client hung up: free what its requests hold."""
        if not call.settled.is_set():
            call.fail(ClientGoneError())
            self.engine.abort(call.requests)

    async def leave(self, call: Call) -> list[RequestOutput]:
        """Abort what still runs, and return what there is of the outputs, for the books."""
        self.abort(call)
        await call.settled.wait()
        return list(call.outputs.values())

    def _deliver(self, batch: list[Delivery]) -> None:
        """Runs in the engine's thread."""
        self._loop.call_soon_threadsafe(self._dispatch, batch)

    def _dispatch(self, batch: list[Delivery]) -> None:
        for request, event in batch:
            if request not in self._live:
                continue  # it was told of the engine's end already
            call, index = self._live[request]
            self._observe(request, event)
            if isinstance(event, OutputDelta):
                if event.output is not None:
                    del self._live[request]
                call.take(index, event)
            else:
                del self._live[request]
                call.fail(api_error_of(event))
                call.settled.set()

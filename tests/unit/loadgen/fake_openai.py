"""An OpenAI server without a model, in a thread of its own; or, as a program, in a process.

An answer is "w0 w1 ...", one word a token. What a prompt begins with makes it misbehave: see
`FAULTS`. Text prompts have as many tokens as words.
"""

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MODEL = "fake-model"
FAULTS = ("busy", "vanish", "break", "garbage", "silent", "endless", "page")


@dataclass
class FakeServer:
    """`interval_s` lies between two tokens, `delay_s` before the first."""

    interval_s: float = 0.0
    delay_s: float = 0.0
    api_key: str | None = None
    has_models: bool = True
    names_usage: bool = True
    closes: bool = False  # each connection, after one answer
    greets: bool = False  # with an event that has no text, at once

    bodies: list[dict[str, Any]] = field(default_factory=list)
    num_connections: int = 0
    num_active: int = 0
    max_active: int = 0
    url: str = ""

    async def serve(self, port: int = 0) -> asyncio.Server:
        server = await asyncio.start_server(self._connected, "127.0.0.1", port)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while await self._exchange(reader, writer) and not self.closes:
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """False: the connection is to be closed."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        request_line, *lines = head.split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines if line)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if self.api_key and headers.get("authorization") != f"bearer {self.api_key}":
            self._plain(writer, 401, {"error": {"message": "wrong key"}})
        elif "/v1/models" in request_line and self.has_models:
            self._plain(writer, 200, {"data": [{"id": MODEL}]})
        elif "completions" in request_line:
            self.num_active += 1
            self.max_active = max(self.max_active, self.num_active)
            try:
                return await self._complete(json.loads(body), writer)
            finally:
                self.num_active -= 1
        else:
            self._plain(writer, 404, {"detail": "Not Found"})
        return True

    async def _complete(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        self.bodies.append(body)
        prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        words = prompt if isinstance(prompt, list) else prompt.split()
        fault = words[0] if words[0] in FAULTS else None
        if fault == "busy":
            self._plain(writer, 429, {"error": {"message": "too many\nrequests"}})
            return True
        if fault == "vanish":
            return False
        if fault == "page":
            self._plain(writer, 200, {"hello": "world"})
            return True
        if fault == "silent":
            await asyncio.sleep(60)
        await self._stream(body, len(words), fault, writer)
        return fault != "break"

    async def _stream(
        self, body: dict[str, Any], prompt_len: int, fault: str | None, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        is_chat = "messages" in body
        if self.greets:
            self._event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(self.delay_s)
        for index in range(body["max_tokens"]):
            text = f"w{index} "
            choice = {"delta": {"content": text}} if is_chat else {"text": text}
            if fault == "break" and index == 2:
                return
            if fault == "garbage" and index == 2:
                self._chunk(writer, b"data: [1, 2]\n\n")
            if index == body["max_tokens"] - 1 and fault != "endless":
                choice["finish_reason"] = "length"
            self._event(writer, {"choices": [{"index": 0, "finish_reason": None, **choice}]})
            await writer.drain()
            await asyncio.sleep(self.interval_s)
        if self.names_usage:
            usage = {"prompt_tokens": prompt_len, "completion_tokens": body["max_tokens"]}
            self._event(writer, {"choices": [], "usage": usage})
        if fault != "endless":
            self._chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    def _event(self, writer: asyncio.StreamWriter, document: dict[str, Any]) -> None:
        head = {"id": "cmpl-0123456789abcdef", "object": "text_completion", "created": 1700000000}
        text = json.dumps({**head, "model": MODEL, **document})
        self._chunk(writer, f"data: {text}\n\n".encode())

    def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _plain(self, writer: asyncio.StreamWriter, status: int, document: object) -> None:
        data = json.dumps(document).encode()
        head = f"HTTP/1.1 {status} Whatever\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)


@contextmanager
def running(server: FakeServer) -> Iterator[FakeServer]:
    """The server listens inside; `url` says where."""
    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(server.serve())
    # A daemon, since a thread that does not end would keep the whole test run from ending.
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        listening.close()
        loop.run_until_complete(_cancel_others())
        loop.close()


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _main(interval_s: float) -> None:
    server = FakeServer(interval_s=interval_s)
    listening = await server.serve()
    print(server.url, flush=True)
    await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(float(sys.argv[1])))

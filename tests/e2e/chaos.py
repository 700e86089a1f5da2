"""Clients that behave badly, many at a time; those that behave must not notice.

As a program: `python -m tests.e2e.chaos URL --pid PID` sends 2,000 requests to a server.
"""

import asyncio
import json
import os
import random
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

PATH = "/v1/completions"
BAD_BODIES = (
    *(b"", b"{", b"[]", b'{"prompt": 7}', b'{"prompt": "a", "n": 0}', b'{"prompt": "\\ud800"}'),
    *(b'{"prompt": "a", "nonsense": 1}', b'{"prompt": "a", "temperature": "hot"}', b"\xff" * 40),
    *(b'{"prompt": "a", "model": "other"}', b"[" * 9000, b'{"prompt": [999999999]}'),
)
WORDS = (
    *("rain", "iron", "Rome", "bees", "salt", "jazz", "tea", "glass"),
    *("wind", "paper", "gold", "snow", "bread", "music", "light", "stone"),
)


@dataclass
class Chaos:
    """One run against a server; `counts` says what was done, `failures` what went wrong."""

    client: httpx.AsyncClient
    rng: random.Random
    asks: list[dict[str, Any]]
    huge_bytes: int  # more than the server takes
    expected: list[list[str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    async def learn(self) -> None:
        """The answers of an undisturbed run."""
        for ask in self.asks:
            response = await self.client.post(PATH, json=ask)
            self.expected.append([choice["text"] for choice in response.json()["choices"]])

    async def run(self, num_requests: int, concurrency: int) -> None:
        """Send requests of random kinds."""
        kinds: list[Callable[[int], Awaitable[None]]] = [
            *([self.stream] * 3),
            *([self.whole] * 2),
            *(self.read_slowly, self.leave_stream, self.leave_stream, self.leave_whole),
            *(self.bad_body, self.huge_prompt, self.half_a_request),
        ]
        plan = [
            (self.rng.choice(kinds), self.rng.randrange(len(self.asks)))
            for _ in range(num_requests)
        ]
        waiting = asyncio.Semaphore(concurrency)

        async def one(kind: Callable[[int], Awaitable[None]], index: int) -> None:
            async with waiting:
                name = kind.__name__
                self.counts[name] += 1
                try:
                    await asyncio.wait_for(kind(index), 120)
                except (AssertionError, TimeoutError, httpx.HTTPError, KeyError) as error:
                    self.failures.append(f"{name} {index}: {type(error).__name__} {error}")

        await asyncio.gather(*(one(kind, index) for kind, index in plan))

    async def stream(self, index: int, pause_s: float = 0.0) -> None:
        texts = [""] * len(self.expected[index])
        ask = {**self.asks[index], "stream": True}
        async with self.client.stream("POST", PATH, json=ask) as response:
            assert response.status_code == 200, response.status_code
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        texts[choice["index"]] += choice["text"]
                    await asyncio.sleep(pause_s)
        assert texts == self.expected[index], f"{texts} is not {self.expected[index]}"

    async def read_slowly(self, index: int) -> None:
        await self.stream(index, pause_s=0.05)

    async def whole(self, index: int) -> None:
        response = await self.client.post(PATH, json=self.asks[index])
        assert response.status_code == 200, response.text
        texts = [choice["text"] for choice in response.json()["choices"]]
        assert texts == self.expected[index], f"{texts} is not {self.expected[index]}"

    async def leave_stream(self, index: int) -> None:
        ask = {**self.asks[index], "stream": True, "max_tokens": 200}
        num_read = self.rng.randrange(6)
        async with self.client.stream("POST", PATH, json=ask) as response:
            async for _ in response.aiter_lines():
                num_read -= 1
                if num_read < 0:
                    return

    async def leave_whole(self, index: int) -> None:
        ask = {**self.asks[index], "max_tokens": 200, "ignore_eos": True}
        await self._send(json.dumps(ask).encode(), linger_s=self.rng.random() * 0.2)

    async def bad_body(self, index: int) -> None:
        headers = {"Content-Type": "application/json"}
        body = self.rng.choice(BAD_BODIES)
        response = await self.client.post(PATH, content=body, headers=headers)
        assert 400 <= response.status_code < 500, response.status_code
        assert response.json()["error"]["message"]

    async def huge_prompt(self, index: int) -> None:
        prompt = self.rng.choice(("word " * 3_000, [1] * 5_000, "x" * self.huge_bytes))
        response = await self.client.post(PATH, json={"prompt": prompt})
        assert response.status_code in (400, 413), response.status_code

    async def half_a_request(self, index: int) -> None:
        body = json.dumps(self.asks[index]).encode()
        await self._send(body, self.rng.randrange(len(body)), linger_s=self.rng.random() * 0.1)

    async def _send(self, body: bytes, num_sent: int | None = None, *, linger_s: float) -> None:
        """A request, or the beginning of one, from somebody who then hangs up."""
        url = self.client.base_url
        _, writer = await asyncio.open_connection(url.host, url.port)
        head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body[:num_sent])
        await writer.drain()
        await asyncio.sleep(linger_s)
        writer.transport.abort()


def make_asks(rng: random.Random, count: int = 12, max_tokens: int = 24) -> list[dict[str, Any]]:
    """Completions with one right answer each: greedy, or with a seed; some share a beginning."""
    shared = "Here is what is known about the matter, told in order and in few words. "
    return [
        {
            "prompt": shared * (i % 3) + " ".join(rng.sample(WORDS, 6)),
            "max_tokens": max_tokens // 2 + rng.randrange(max_tokens),
            "temperature": (0, 0.9)[i % 2],
            "seed": i,
            "n": 1 + (i % 4 == 3),
        }
        for i in range(count)
    ]


async def run_chaos(
    url: str,
    num_requests: int,
    *,
    concurrency: int = 24,
    max_tokens: int = 24,
    seed: int = 0,
    huge_bytes: int = 20_000_000,
) -> Chaos:
    """Learn the right answers, make chaos, and wait until the engine is idle."""
    rng = random.Random(seed)
    limits = httpx.Limits(max_connections=2 * concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        chaos = Chaos(client, rng, make_asks(rng, max_tokens=max_tokens), huge_bytes)
        await chaos.learn()
        await chaos.run(num_requests, concurrency)
        give_up_s = time.monotonic() + 30
        while True:
            stats = (await client.get("/engine/stats")).json()
            if not (stats["num_running"] or stats["num_waiting"] or stats["num_used_blocks"]):
                break
            assert time.monotonic() < give_up_s, f"something is left: {stats}"
            await asyncio.sleep(0.05)
    return chaos


def num_open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, required=True, help="the server's process")
    parser.add_argument("--requests", type=int, default=2000)
    options = parser.parse_args()
    asyncio.run(run_chaos(options.url, 200))
    files, memory = num_open_files(options.pid), resident_bytes(options.pid)
    started_s = time.monotonic()
    chaos = asyncio.run(run_chaos(options.url, options.requests, seed=1))
    time.sleep(1)
    print(
        f"{options.requests} requests in {time.monotonic() - started_s:.0f} s:", dict(chaos.counts)
    )
    print(f"open files {files} -> {num_open_files(options.pid)}")
    print(f"resident {memory / 2**20:.0f} -> {resident_bytes(options.pid) / 2**20:.0f} MiB")
    print(f"{len(chaos.failures)} failures", *chaos.failures[:20], sep="\n")


if __name__ == "__main__":
    main()

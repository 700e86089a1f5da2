"""What the live view is told: the engine at a moment, and the KV blocks as run lengths."""

import asyncio
import json
import re
import time

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenmill.backends.base import BLOCK_SIZE
from tokenmill.engine.engine import Engine
from tokenmill.engine.stats import BlockMap
from tokenmill.server.life import Life

INTERVAL_S = 0.2
_LETTERS = bytes.maketrans(bytes((BlockMap.FREE, BlockMap.CACHED, BlockMap.USED)), b"fcu")
_RUN = re.compile(rb"(.)\1*")


def block_runs(blocks: BlockMap) -> str:
    """Run lengths of letters: f free, c cached, u used by one sequence, s shared by several."""
    letters = bytearray(blocks.states.translate(_LETTERS))
    for index, count in enumerate(blocks.references):
        if count > 1:
            letters[index] = ord("s")
    return "".join(f"{len(run[0])}{chr(run[0][0])}" for run in _RUN.finditer(letters))


class Feed:
    """Snapshots of an engine, shared by all who watch."""

    def __init__(self, engine: Engine, life: Life) -> None:
        self._engine = engine
        self._life = life
        self._taken_s = -INTERVAL_S
        self._snapshot = b""

    def snapshot(self) -> bytes:
        """JSON, at most INTERVAL_S old."""
        now = time.monotonic()
        if now - self._taken_s >= INTERVAL_S / 2:
            self._taken_s = now
            self._snapshot = json.dumps(self._take(now)).encode()
        return self._snapshot

    def events(self) -> "FeedStream":
        return FeedStream(self, self._life)

    def _take(self, now: float) -> dict[str, object]:
        stats, blocks = self._engine.stats(), self._engine.block_map()
        return {
            "time_s": now,
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "prompt_tokens": stats.prompt_tokens,
            "cached_prompt_tokens": stats.prefix_cache_hits,
            "generation_tokens": stats.generation_tokens,
            "prefix_cache_queries": stats.prefix_cache_queries,
            "prefix_cache_hits": stats.prefix_cache_hits,
            "num_preemptions": stats.num_preemptions,
            "num_evictions": blocks.num_evictions,
            "last_evicted": blocks.last_evicted,
            "num_blocks": stats.num_blocks,
            "num_used_blocks": stats.num_used_blocks,
            "block_size": BLOCK_SIZE,
            "blocks": block_runs(blocks),
        }


class FeedStream(Response):
    """A snapshot every INTERVAL_S, until the client or the server ends it."""

    media_type = "text/event-stream"

    def __init__(self, feed: Feed, life: Life) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._feed = feed
        self._life = life

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        gone = asyncio.create_task(_wait_for_disconnect(receive))
        ended = asyncio.create_task(self._life.ended.wait())
        try:
            with self._life.watching():
                while not (gone.done() or ended.done()):
                    data = b"data: " + self._feed.snapshot() + b"\n\n"
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    await asyncio.wait(
                        (gone, ended), timeout=INTERVAL_S, return_when=asyncio.FIRST_COMPLETED
                    )
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            ended.cancel()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

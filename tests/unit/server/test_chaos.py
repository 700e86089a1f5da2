"""The same chaos as with the real model, where one can look inside."""

import asyncio

from tests.e2e.chaos import run_chaos
from tests.unit.server.running import running_server, wait_for


def num_tasks(loop: asyncio.AbstractEventLoop) -> int:
    async def count() -> int:
        return len(asyncio.all_tasks()) - 1

    return asyncio.run_coroutine_threadsafe(count(), loop).result(10)


def test_nothing_is_left_after_chaos() -> None:
    with running_server(step_s=0.001) as made:
        before = num_tasks(made.loop)
        chaos = asyncio.run(run_chaos(made.url, 150, max_tokens=12))
        assert chaos.failures == []
        made.wait_until_idle()
        wait_for(lambda: num_tasks(made.loop) == before)
        assert made.service.life.num_active == 0
        assert not made.service.meters._last_token_s
        wait_for(lambda: not made.server.server_state.connections)

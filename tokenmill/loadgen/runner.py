"""Send requests at their times, and keep what became of each."""

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field

from tokenmill.errors import UsageError
from tokenmill.loadgen.records import LoadRequest, RequestRecord
from tokenmill.loadgen.target import Target, TargetError

OnRecord = Callable[[RequestRecord], None]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run; records are in the order of the schedule.

    `client_load` is the share of one core that this process used: a client that is busy measures
    itself. `max_delay_s` is how late a request was sent at the worst, waiting for
    `max_concurrency` not included.
    """

    records: list[RequestRecord] = field(repr=False)
    duration_s: float
    client_load: float
    max_delay_s: float


async def warm_up(target: Target, requests: Sequence[LoadRequest]) -> None:
    """Send requests that do not count, all at once. Raises TargetError where one fails."""
    start_s = time.perf_counter()
    records = await asyncio.gather(*(target.send(request, start_s) for request in requests))
    for record in records:
        if record.error is not None:
            raise TargetError(
                f"{target.options.base_url}{target.options.endpoint} fails the warm-up: "
                f"{record.error}"
            )


async def run_load(
    target: Target,
    timed: Sequence[tuple[float, LoadRequest]],
    *,
    max_concurrency: int | None = None,
    on_record: OnRecord | None = None,
) -> Run:
    """Send each request at its time, in seconds from now; at most `max_concurrency` at once.

    A request that waits for its turn has not started. Raises nothing for requests that fail.
    """
    if max_concurrency is not None and max_concurrency < 1:
        raise UsageError(f"--max-concurrency is {max_concurrency}, but must be at least 1")
    turn: AbstractAsyncContextManager[object] = (
        nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    )
    # What there is now outlives the run: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    start_s, start_cpu_s = time.perf_counter(), time.process_time()

    async def send(request: LoadRequest) -> RequestRecord:
        async with turn:
            record = await target.send(request, start_s)
        if on_record:
            on_record(record)
        return record

    try:
        max_delay_s, tasks = 0.0, []
        async with asyncio.TaskGroup() as group:
            for due_s, request in timed:
                delay_s = start_s + due_s - time.perf_counter()
                if delay_s > 0:
                    await asyncio.sleep(delay_s)
                max_delay_s = max(max_delay_s, time.perf_counter() - start_s - due_s)
                tasks.append(group.create_task(send(request)))
        duration_s = time.perf_counter() - start_s
        cpu_s = time.process_time() - start_cpu_s
    finally:
        gc.unfreeze()
    return Run(
        records=[task.result() for task in tasks],
        duration_s=duration_s,
        client_load=cpu_s / duration_s,
        max_delay_s=max_delay_s,
    )

"""The engine: one thread that runs the step loop, and the way in from all other threads."""

import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from queue import SimpleQueue
from typing import TYPE_CHECKING

from tokenmill.backends.base import CompiledModel
from tokenmill.engine.backlog import Backlog
from tokenmill.engine.prompt_budget import PromptBudget
from tokenmill.engine.request import Delivery, EngineDeadError, Request, Sample, Sink
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.speculation import Speculator
from tokenmill.engine.stats import (
    STEP_TOKEN_BOUNDS,
    BlockMap,
    EngineStats,
    Heartbeat,
    Histogram,
)
from tokenmill.engine.step_loop import StepLoop
from tokenmill.errors import CapacityError, TokenmillError, UsageError

if TYPE_CHECKING:
    from tokenmill.models.adapters import Adapter


class QueueFullError(CapacityError):
    """As many requests wait as may wait; it may be tried again later."""


class DrainingError(TokenmillError):
    """The engine takes no new requests, since it is about to end."""


class ClosedError(UsageError):
    """The engine has ended."""


class Engine:
    """Serves requests with one compiled model, which it owns and closes.

    All methods may be called from any thread; what they ask for is done by the engine's thread
    between two steps. Every request that was submitted gets its last delta or an error, whatever
    happens.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        *,
        has_prefix_cache: bool = True,
        speculator: Speculator | None = None,
        prompt_budget: PromptBudget | None = None,
        max_waiting: int | None = None,
    ) -> None:
        self._compiled = compiled
        self._loop = StepLoop(
            compiled,
            has_prefix_cache=has_prefix_cache,
            speculator=speculator,
            prompt_budget=prompt_budget,
        )
        self._max_waiting = max_waiting
        self._live: dict[Sequence, tuple[Request, Sample]] = {}
        self._backlog = Backlog()  # those of _live that do not even wait
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._outbox: dict[Sink, list[Delivery]] = {}
        # Guards _live's growth, the backlog and the flags; reentrant, since a garbage collection
        # may call `close` from anywhere. Whoever waits for it is told when nothing is live any
        # more, or nothing with some adapter.
        self._lock = threading.Condition(threading.RLock())
        self._is_open = True
        self._is_draining = False
        self._error: BaseException | None = None
        self._beat_s = time.monotonic()
        self._is_paused = False  # this and the next: the engine thread's own
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="tokenmill-engine", daemon=True)
        self._thread.start()

    def submit(self, requests: SequenceOf[Request], *, in_turn: bool = False) -> None:
        """Queue requests together, all or none.

        `in_turn`: only as many as keep steps full, of which each is followed by another once it
        ends, so that any number may be given. Raises EngineDeadError, QueueFullError, DrainingError
        or, after `close`, ClosedError; UsageError for more than could ever wait together.
        """
        sequences = {s.sequence: (request, s) for request in requests for s in request.samples}
        at_once = len(sequences)
        if in_turn:
            at_once = min(at_once, self._num_in_turn)
        else:
            self.check_count(len(requests), max((len(r.samples) for r in requests), default=0))
        for request in requests:
            request.start_clock()
        with self._lock:
            self._check_open(at_once)
            if not self._live:
                self._beat_s = time.monotonic()
            self._live.update(sequences)
            first = self._backlog.hold(list(sequences), at_once)
            self._commands.put(lambda: self._add(first))

    def check_count(self, num_prompts: int, num_samples: int) -> None:
        """UsageError where so many prompts, with so many samples each, could never be queued."""
        room = self._room
        if room is None:
            return
        if num_samples > room:
            raise UsageError(f"n is {num_samples}, but at most {room} sequences may run and wait")
        if num_prompts * num_samples > room:
            raise UsageError(
                f"prompt has {num_prompts} prompts of {num_samples} samples each, but at most "
                f"{room} sequences may run and wait"
            )

    def abort(self, requests: SequenceOf[Request]) -> None:
        """End requests early with finish reason "abort"; those that have ended stay as they are.

        Their blocks are free before the next step is planned.
        """
        self._commands.put(lambda: self._abort(requests))

    def pause(self) -> None:
        """Start no step until `resume`; requests keep what they have, and new ones queue up."""
        self._commands.put(lambda: self._set_paused(True))

    def resume(self) -> None:
        self._commands.put(lambda: self._set_paused(False))

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more requests, and wait until all that are there have ended.

        False: after `timeout_s` some had not, and they still run.
        """
        with self._lock:
            self._is_draining = True
            return self._lock.wait_for(lambda: not self._live, timeout_s)

    def wait_unused(self, adapter: "Adapter", timeout_s: float | None = None) -> bool:
        """Wait until no request has an adapter; False: after `timeout_s` some still had it."""
        with self._lock:
            return self._lock.wait_for(lambda: not self.uses(adapter), timeout_s)

    def uses(self, adapter: "Adapter") -> bool:
        """Has some request that adapter?"""
        with self._lock:
            return any(sequence.adapter is adapter for sequence in self._live)

    def close(self) -> None:
        """Abort what runs, end the thread and free the model; a second call does nothing."""
        with self._lock:
            self._is_open = False
            self._commands.put(self._stop)
        # A garbage collection in the engine's thread may be what closes it.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def stats(self) -> EngineStats:
        """Counts of what is there and of what has been done."""
        scheduler = self._loop.scheduler
        counters, pool = scheduler.counters, scheduler.pool
        num_running = len(scheduler.running)
        return EngineStats(
            num_running=num_running,
            num_waiting=max(0, len(self._live) - num_running),
            num_blocks=pool.num_blocks,
            num_used_blocks=pool.num_blocks - pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_steps=counters.num_steps,
            num_preemptions=counters.num_preemptions,
            num_evictions=pool.num_evictions,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            prefix_cache_queries=counters.prefix_cache_queries,
            prefix_cache_hits=counters.prefix_cache_hits,
            draft_tokens=counters.draft_tokens,
            accepted_tokens=counters.accepted_tokens,
            step_tokens=Histogram(
                STEP_TOKEN_BOUNDS, tuple(counters.step_tokens), counters.step_tokens_sum
            ),
            max_loras=self._compiled.limits.adapter_slots,
            running_loras=_adapter_names(scheduler.running),
            waiting_loras=_adapter_names(scheduler.waiting),
        )

    def block_map(self) -> BlockMap:
        """What each block of the KV cache is used for."""
        pool = self._loop.scheduler.pool
        num_evictions, last_evicted = pool.num_evictions, tuple(pool.last_evicted())
        references, is_named = pool.snapshot()
        states = bytes(
            BlockMap.USED if count else BlockMap.CACHED if named else BlockMap.FREE
            for count, named in zip(references, is_named, strict=True)
        )
        return BlockMap(states, tuple(references), num_evictions, last_evicted)

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(
            is_alive=self._error is None and self._thread.is_alive(),
            is_paused=self._is_paused,
            has_work=bool(self._live),
            idle_s=time.monotonic() - self._beat_s,
        )

    @property
    def _room(self) -> int | None:
        """Sequences that may run and wait; None: any number."""
        if self._max_waiting is None:
            return None
        return self._loop.scheduler.max_running + self._max_waiting

    @property
    def _num_in_turn(self) -> int:
        """Sequences of one call that keep all steps full: those that run, and their followers."""
        wanted = 2 * self._loop.scheduler.max_running
        return wanted if self._room is None else min(wanted, self._room)

    def _check_open(self, num_new: int) -> None:
        if self._error is not None:
            raise _dead(self._error)
        if not self._is_open:
            raise ClosedError("the LLM is closed: make a new one")
        if self._is_draining:
            raise DrainingError("the server is shutting down: send the request to another")
        if self._max_waiting is None:
            return
        num_queued = len(self._live) - self._backlog.num_held + num_new
        is_over = num_queued > self._loop.scheduler.max_running + self._max_waiting
        if is_over or len(self._loop.scheduler.waiting) > self._max_waiting:
            raise QueueFullError(
                f"{self._max_waiting} requests wait already, which is the limit: try again later"
            )

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self._fail(error)
        finally:
            self._loop.close()
            self._compiled.close()

    def _serve(self) -> None:
        while True:
            self._obey()
            if self._is_closing:
                return self._loop.drain()
            for sequence in self._loop.turn():
                request, sample = self._live[sequence]
                request.note_token()
                self._advance(request, sample)
            if not self._loop.is_idle:
                self._beat_s = time.monotonic()
            self._flush()

    def _obey(self) -> None:
        """Carry out what was asked for; without work, wait for it."""
        while (self._is_paused or not self._loop.has_work) and not self._is_closing:
            self._commands.get()()
            self._flush()
        while not self._commands.empty():
            self._commands.get()()
        self._flush()

    def _add(self, sequences: SequenceOf[Sequence]) -> None:
        for sequence in sequences:
            self._loop.scheduler.add(sequence)

    def _abort(self, requests: SequenceOf[Request]) -> None:
        for request in reversed(requests):  # so that none is let go to be aborted then
            for sample in request.samples:
                if sample.sequence in self._live:
                    self._end(sample.sequence)
                    self._advance(request, sample)

    def _end(self, sequence: Sequence) -> None:
        with self._lock:
            is_held = self._backlog.drop(sequence)
        if is_held:
            sequence.finish_reason = "abort"
        else:
            self._loop.scheduler.finish(sequence, "abort")

    def _set_paused(self, is_paused: bool) -> None:
        self._is_paused = is_paused
        self._beat_s = time.monotonic()

    def _stop(self) -> None:
        self._abort([request for request, _ in self._live.values()])
        self._is_closing = True

    def _advance(self, request: Request, sample: Sample) -> None:
        """Deliver what is due; a stop string in the text ends the sequence here."""
        if not request.is_due(sample):
            return
        sequence = sample.sequence
        delta = sample.decode()
        if sample.text.matched is not None:
            self._loop.scheduler.finish(sequence, "stop", sample.text.matched)
        if sequence.finish_reason is not None:
            delta = request.close(sample, delta)
            self._forget(sequence)
        if request.is_streaming or delta.output is not None:
            self._outbox.setdefault(request.sink, []).append(Delivery(request, delta))

    def _forget(self, sequence: Sequence) -> None:
        with self._lock:
            del self._live[sequence]
            following = self._backlog.follow(sequence)
            if not self._live or sequence.adapter is not None:
                self._lock.notify_all()
        if following is not None:
            self._loop.scheduler.add(following)

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, {}
        for sink, deliveries in outbox.items():
            sink(deliveries)

    def _fail(self, error: BaseException) -> None:
        """Let everybody know who waits, and everybody who comes later."""
        with self._lock:
            self._error = error
            requests = dict.fromkeys(request for request, _ in self._live.values())
            self._live.clear()
            self._lock.notify_all()
        for request in requests:
            self._outbox.setdefault(request.sink, []).append(Delivery(request, _dead(error)))
        self._flush()


def _adapter_names(sequences: SequenceOf[Sequence]) -> tuple[str, ...]:
    """The engine's thread may change the list meanwhile, so that it is copied at once."""
    return tuple(sorted({s.adapter.name for s in tuple(sequences) if s.adapter is not None}))


def _dead(error: BaseException) -> EngineDeadError:
    dead = EngineDeadError(f"the engine stopped: {type(error).__name__}: {error}")
    dead.__cause__ = error
    return dead

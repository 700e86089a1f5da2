"""The engine: one thread that runs the step loop, and the way in from all other threads."""

import threading
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from queue import SimpleQueue

from tokenmill.backends.base import CompiledModel
from tokenmill.engine.request import Request
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.step_loop import StepLoop
from tokenmill.errors import UsageError


class EngineDeadError(RuntimeError):
    """The engine's thread ended with an error, which is the cause of this one."""


class Engine:
    """Serves requests with one compiled model, which it owns and closes.

    `submit`, `abort` and `close` may be called from any thread; what they ask for is done by the
    engine's thread between two steps. Every request that was submitted gets its last delta or
    an error, whatever happens.
    """

    def __init__(self, compiled: CompiledModel) -> None:
        self._compiled = compiled
        self._loop = StepLoop(compiled)
        self._live: dict[Sequence, Request] = {}
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # Guards _live's growth, _is_open and _error; reentrant, since a garbage collection may
        # call `close` from anywhere.
        self._lock = threading.RLock()
        self._is_open = True
        self._error: BaseException | None = None
        self._is_closing = False  # the engine thread's own
        self._thread = threading.Thread(target=self._run, name="tokenmill-engine", daemon=True)
        self._thread.start()

    def submit(self, requests: SequenceOf[Request]) -> None:
        """Queue requests together; raises EngineDeadError or, after `close`, UsageError."""
        for request in requests:
            request.start_clock()
        with self._lock:
            if self._error is not None:
                raise _dead(self._error)
            if not self._is_open:
                raise UsageError("the LLM is closed: make a new one")
            self._live.update((request.sequence, request) for request in requests)
            self._commands.put(lambda: self._add(requests))

    def abort(self, requests: SequenceOf[Request]) -> None:
        """End requests early with finish reason "abort"; those that have ended stay as they are."""
        self._commands.put(lambda: self._abort(requests))

    def close(self) -> None:
        """Abort what runs, end the thread and free the model; a second call does nothing."""
        with self._lock:
            self._is_open = False
            self._commands.put(self._stop)
        # A garbage collection in the engine's thread may be what closes it.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self._fail(error)
        finally:
            self._compiled.close()

    def _serve(self) -> None:
        while True:
            self._obey()
            if self._is_closing:
                return self._loop.drain()
            for sequence in self._loop.turn():
                self._live[sequence].note_token()
                self._advance(self._live[sequence])

    def _obey(self) -> None:
        """Carry out what was asked for; without work, wait for it."""
        while not self._loop.has_work and not self._is_closing:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _add(self, requests: SequenceOf[Request]) -> None:
        for request in requests:
            self._loop.scheduler.add(request.sequence)

    def _abort(self, requests: SequenceOf[Request]) -> None:
        for request in requests:
            if request.sequence in self._live:
                self._loop.scheduler.finish(request.sequence, "abort")
                self._advance(request)

    def _stop(self) -> None:
        self._abort(list(self._live.values()))
        self._is_closing = True

    def _advance(self, request: Request) -> None:
        """Deliver what is due; a stop string in the text ends the sequence here."""
        if not request.is_due:
            return
        delta = request.decode()
        if request.text.matched is not None:
            self._loop.scheduler.finish(request.sequence, "stop", request.text.matched)
        if request.sequence.finish_reason is not None:
            del self._live[request.sequence]
            request.deliver(request.closed(delta))
        elif request.is_streaming:
            request.deliver(delta)

    def _fail(self, error: BaseException) -> None:
        """Let everybody know who waits, and everybody who comes later."""
        with self._lock:
            self._error = error
        for request in self._live.values():
            request.deliver(_dead(error))
        self._live.clear()


def _dead(error: BaseException) -> EngineDeadError:
    dead = EngineDeadError(f"the engine stopped: {type(error).__name__}: {error}")
    dead.__cause__ = error
    return dead

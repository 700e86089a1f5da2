"""Who drives the engine: the caller itself, or a thread, while asynchronous calls are under way."""

import threading
from collections import deque
from typing import Any

import numpy as np

from tokenmill.collectives.executor.engine import Engine
from tokenmill.collectives.executor.run import Run
from tokenmill.errors import CollectiveError


class Work:
    """A call under way. The arrays given to it must be left alone until it is done."""

    def __init__(self, run: Run, result: Any) -> None:
        self._run, self._result = run, result
        self._is_done = threading.Event()
        self._callbacks: list[Any] = []
        self._lock = threading.Lock()

    def is_done(self) -> bool:
        return self._is_done.is_set()

    def wait(self, timeout_s: float | None = None) -> Any:
        """The call's result, when it is done. Raises CollectiveError if it failed or if it is not
        done in time."""
        if not self._is_done.wait(timeout_s):
            raise CollectiveError(f"{self._run.call} is not done within {timeout_s:g} s")
        if self._run.error is not None:
            raise self._run.error
        return self._result

    def error(self) -> Exception | None:
        """Why it failed, once it is done."""
        return self._run.error

    def when_done(self, callback: Any) -> None:
        """Call `callback(work)`, on the thread that finishes it, or now if it is done."""
        with self._lock:
            if not self.is_done():
                self._callbacks.append(callback)
                return
        callback(self)

    def finish(self) -> None:
        with self._lock:
            self._is_done.set()
        for callback in self._callbacks:
            callback(self)


class Dispatcher:
    """Runs calls in the order in which they are made."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine, self._name = engine, name
        self._driving = threading.Lock()
        self._changed = threading.Condition()
        self._queue: deque[tuple[Run, Work]] = deque()
        self._num_open = 0
        """Asynchronous calls that are not done."""
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def run(self, run: Run) -> None:
        """Do a call now. Raises CollectiveError."""
        if self._num_open:
            self.submit(run, None).wait()
            return
        with self._driving, np.errstate(all="ignore"):
            try:
                self._engine.submit(run)
                while not run.is_done:
                    self._engine.advance()
            except BaseException as error:
                self._engine.give_up(f"{type(error).__name__} {error}".strip())
                raise
        if run.error is not None:
            raise run.error

    def submit(self, run: Run, result: Any) -> Work:
        """Begin a call."""
        work = Work(run, result)
        with self._changed:
            if self._is_closed:
                raise CollectiveError(f"{run.call}: the communicator is closed")
            self._num_open += 1
            self._queue.append((run, work))
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return work

    def _serve(self) -> None:
        works: list[tuple[Run, Work]] = []
        with np.errstate(all="ignore"):
            while self._take(works):
                try:
                    with self._driving:
                        if not self._engine.is_idle:
                            self._engine.advance()
                except Exception as error:
                    self._engine.give_up(f"{type(error).__name__} {error}".strip())
                works = self._finish(works)

    def _take(self, works: list[tuple[Run, Work]]) -> bool:
        """Hand new calls to the engine; waits if nothing is under way. False when closed."""
        with self._changed:
            while not works and not self._queue and not self._is_closed:
                self._changed.wait()
            new = list(self._queue)
            self._queue.clear()
        for run, work in new:
            with self._driving:
                self._engine.submit(run)
            works.append((run, work))
        return bool(works) or not self._is_closed

    def _finish(self, works: list[tuple[Run, Work]]) -> list[tuple[Run, Work]]:
        left = [entry for entry in works if not entry[0].is_done]
        for run, work in works:
            if run.is_done:
                with self._changed:
                    self._num_open -= 1
                work.finish()
        return left

    def close(self) -> None:
        """End the thread. Calls under way fail."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            with self._driving:
                if not self._engine.is_idle:
                    self._engine.give_up("the communicator was closed while calls were under way")
            self._thread.join()

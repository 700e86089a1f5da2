"""Calls under way, as torch waits for them."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist

from tokenmill.collectives.executor.dispatch import Work


class TorchWork(dist._Work):
    """Some calls (None: done already), and copies to be made when all are done."""

    def __init__(
        self,
        works: Sequence[Work | None],
        result: list[torch.Tensor],
        copies: Sequence[Callable[[], None]] = (),
    ) -> None:
        super().__init__()
        self._works = [work for work in works if work is not None]
        self._result, self._copies = result, copies
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        self._num_open, self._lock = len(self._works), Lock()
        if not self._works:
            self._finish()
        for work in self._works:
            work.when_done(self._count_down)

    def _count_down(self, work: Work) -> None:
        with self._lock:
            self._num_open -= 1
            is_last = self._num_open == 0
        if is_last:
            self._finish()

    def _finish(self) -> None:
        error = self.exception()
        if error is not None:
            self._future.set_exception(error)
            return
        for copy in self._copies:
            copy()
        self._future.set_result(self._result)

    def is_completed(self) -> bool:
        return self._future.done()

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def exception(self) -> Exception | None:
        return next((e for work in self._works if (e := work.error()) is not None), None)

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        timeout_s = timeout.total_seconds() or None
        for work in self._works:
            work.wait(timeout_s)
        self._future.wait()
        return True

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> list[torch.Tensor]:
        return self._result

    def get_future(self) -> "torch.futures.Future[Any]":
        return self._future

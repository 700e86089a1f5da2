"""Over the send and receive of a process group of torch.distributed, whatever its backend.

Gloo moves a message on, and tells that it is done, to those alone who wait for it. So each
direction of each link has a thread that waits.
"""

import threading
from collections.abc import Sequence
from datetime import timedelta
from queue import SimpleQueue

import torch
import torch.distributed as dist

from tokenmill.collectives.transports.channel import Bytes
from tokenmill.collectives.transports.messages import Check, MessageTransport, PeerLostError

_FOREVER = timedelta(days=365)
"""A group whose wait runs out of time breaks all its connections; timeouts are the engine's."""
_PAUSE_S = 0.005


class _Message:
    """A message under way, and the work that moves it."""

    def __init__(self, work: dist.Work) -> None:
        self._work = work
        self._is_done, self._error = False, ""

    def wait(self) -> None:
        try:
            self._work.wait(_FOREVER)
        except RuntimeError as error:
            self._error = str(error)
        self._is_done = True

    def is_done(self) -> bool:
        if self._error:
            raise PeerLostError(self._error)
        return self._is_done


class _Watcher:
    """Waits for messages one after the other, in a thread of its own."""

    def __init__(self, name: str, changed: threading.Condition) -> None:
        self._queue: SimpleQueue[_Message | None] = SimpleQueue()
        self._changed = changed
        # A daemon: a peer that is gone without a word must not keep the process from ending.
        self._thread = threading.Thread(target=self._watch, name=name, daemon=True)
        self._thread.start()

    def watch(self, work: dist.Work) -> _Message:
        message = _Message(work)
        self._queue.put(message)
        return message

    def _watch(self) -> None:
        while (message := self._queue.get()) is not None:
            message.wait()
            with self._changed:
                self._changed.notify_all()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(_PAUSE_S)


class TorchLink:
    """Messages to and from a rank of a group, all with one tag."""

    def __init__(
        self, group: dist.ProcessGroup, peer: int, tag: int, changed: threading.Condition
    ) -> None:
        self._group, self._peer, self._tag = group, peer, tag
        self._sends = _Watcher(f"to rank {peer}", changed)
        self._receives = _Watcher(f"from rank {peer}", changed)

    def isend(self, message: Bytes) -> _Message:
        try:
            work = self._group.send([torch.from_numpy(message)], self._peer, self._tag)
        except RuntimeError as error:
            raise PeerLostError(str(error)) from None
        return self._sends.watch(work)

    def irecv(self, message: Bytes) -> _Message:
        try:
            work = self._group.recv([torch.from_numpy(message)], self._peer, self._tag)
        except RuntimeError as error:
            raise PeerLostError(str(error)) from None
        return self._receives.watch(work)

    def close(self) -> None:
        self._sends.close()
        self._receives.close()


def make_torch_transport(group: dist.ProcessGroup, tag: int) -> MessageTransport:
    """Between all ranks of a group, in which nobody else uses this tag."""
    changed = threading.Condition()

    def wait_for(checks: Sequence[Check], attempt: int) -> None:
        with changed:
            changed.wait_for(lambda: any(check() for check in checks), _PAUSE_S)

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    links = {peer: TorchLink(group, peer, tag, changed) for peer in range(size) if peer != rank}
    return MessageTransport(f"torch.distributed ({dist.get_backend(group)})", links, wait_for)

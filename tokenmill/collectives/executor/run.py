"""One program under way at one rank: which steps are ready, and what they do to the buffers.

Steps start as soon as what they wait for is complete. Local ones are done on the spot; sends queue
for their peer's channel; a receive takes in its message piece by piece, and reduces each piece
where it lies. The engine moves the pieces.
"""

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from tokenmill.collectives.arithmetic import Array, Bytes, DataType, Reduce
from tokenmill.collectives.executor.schedule import COPY, RECV, SEND, Action, Schedule
from tokenmill.collectives.ranges import Ranges
from tokenmill.collectives.transports.wire import Call, call_number, is_message, unpack_call


class Outgoing:
    """A message that waits for its channel, which has taken `done` bytes."""

    __slots__ = ("done", "payload", "step", "tag")

    def __init__(self, step: int, tag: int, payload: Bytes) -> None:
        self.step, self.tag, self.payload, self.done = step, tag, payload, 0


class Incoming:
    """A message that is awaited, `num_bytes` in all, of which `done` have come."""

    __slots__ = ("action", "done", "num_bytes", "step")

    def __init__(self, step: int, action: Action, num_bytes: int) -> None:
        self.step, self.action, self.num_bytes, self.done = step, action, num_bytes, 0


class Run:
    """The state of one call. Done when `num_open` is 0, or `error` is set."""

    def __init__(
        self,
        packed: bytes,
        schedule: Schedule,
        buffers: dict[str, Array],
        dtype: DataType,
        reduce: Reduce | None,
        finish: Callable[[], None] | None = None,
    ) -> None:
        """`packed` is the call. `buffers` holds the caller's, one-dimensional and contiguous;
        scratch is added. `finish` is called when the last step is complete."""
        self.packed, self.number = packed, call_number(packed)
        self.is_message = is_message(packed)
        self.error: Exception | None = None
        self.num_open = len(schedule.actions)
        self.outgoing: dict[int, deque[Outgoing]] = {p: deque() for p in schedule.send_peers}
        self.incoming: dict[tuple[int, int], deque[Incoming]] = {}
        self.num_awaited = dict.fromkeys(schedule.num_received, 0)
        """Receives that have started, by peer."""
        self.num_to_come = dict(schedule.num_received)
        """Messages that have not come in full, by peer."""
        self.num_moves = self.num_moves_seen = 0
        self.last_move_s = 0.0
        self._schedule, self._dtype, self._finish = schedule, dtype, finish
        self._waits = list(schedule.waits)
        self._reduce = reduce
        self._buffers = buffers
        for buffer in schedule.buffers:
            if buffer.name not in buffers:
                wanted = dtype.wide if buffer.is_wide else dtype.numpy
                buffers[buffer.name] = np.empty(buffer.count, wanted)

    @property
    def call(self) -> Call:
        """For messages."""
        return unpack_call(self.packed)

    @property
    def is_done(self) -> bool:
        return self.num_open == 0 or self.error is not None

    def start(self) -> None:
        """Start what waits for nothing."""
        self.last_move_s = time.monotonic()
        if self._schedule.actions:
            self._start_all(list(self._schedule.first))
        elif self._finish:
            self._finish()

    def complete(self, step: int) -> None:
        """A step is complete: start those that waited for it alone."""
        self._start_all(self._completed(step))

    def take(self, incoming: Incoming, payload: Bytes) -> bool:
        """A piece of an awaited message, in order. True if the message is complete."""
        action, itemsize = incoming.action, self._dtype.numpy.itemsize
        source = payload.view(self._dtype.numpy)
        first = incoming.done // itemsize
        if len(action.ranges) == 1:
            start = action.ranges[0][0] + first
            self._put(action, self._buffers[action.buffer][start : start + source.size], source)
        else:
            self._scatter(action, source, first)
        incoming.done += payload.size
        self.num_moves += 1
        return incoming.done == incoming.num_bytes

    def received(self, incoming: Incoming) -> None:
        """The first message of a lane is complete."""
        peer, tag = incoming.action.peer, incoming.action.tag
        self.incoming[peer, tag].popleft()
        self.num_awaited[peer] -= 1
        self.num_to_come[peer] -= 1
        self.complete(incoming.step)

    def _start_all(self, ready: list[int]) -> None:
        actions, next_on_lane, waits = (
            self._schedule.actions,
            self._schedule.next_on_lane,
            self._waits,
        )
        while ready:
            step = ready.pop()
            action = actions[step]
            if action.kind >= COPY:
                self._do_local(action)
                ready += self._completed(step)
                continue
            self._post(step, action)
            later = next_on_lane[step]
            if later >= 0:
                waits[later] -= 1
                if not waits[later]:
                    ready.append(later)

    def _completed(self, step: int) -> list[int]:
        waits, ready = self._waits, []
        self.num_open -= 1
        for follower in self._schedule.followers[step]:
            waits[follower] -= 1
            if not waits[follower]:
                ready.append(follower)
        if not self.num_open and self._finish:
            self._finish()
        return ready

    def _post(self, step: int, action: Action) -> None:
        """Queue a message at its peer's channel, or await one."""
        peer = action.peer
        if action.kind == SEND:
            payload = _elements(self._buffers[action.buffer], action.ranges).view(np.uint8)
            self.outgoing[peer].append(Outgoing(step, action.tag, payload))
            return
        lane = self.incoming.get((peer, action.tag))
        if lane is None:
            lane = self.incoming[peer, action.tag] = deque()
        lane.append(Incoming(step, action, action.count * self._dtype.numpy.itemsize))
        self.num_awaited[peer] += 1

    def _do_local(self, action: Action) -> None:
        source = _elements(self._buffers[action.source], action.source_ranges)
        if len(action.ranges) == 1:
            start, stop = action.ranges[0]
            self._put(action, self._buffers[action.buffer][start:stop], source)
        else:
            self._scatter(action, source, 0)

    def _put(self, action: Action, target: Array, source: Array) -> None:
        if action.kind == RECV or action.kind == COPY:
            target[...] = source
        else:
            assert self._reduce is not None, "a program reduces where the operation does not"
            self._reduce(target, source)

    def _scatter(self, action: Action, source: Array, first: int) -> None:
        """Elements `first` and so on of a chunk of several ranges."""
        buffer, done, skip = self._buffers[action.buffer], 0, first
        for start, stop in action.ranges:
            if skip >= stop - start:
                skip -= stop - start
                continue
            count = min(stop - start - skip, source.size - done)
            if count <= 0:
                return
            begin = start + skip
            self._put(action, buffer[begin : begin + count], source[done : done + count])
            done, skip = done + count, 0


def _elements(buffer: Array, ranges: Ranges) -> Array:
    """A chunk as one piece: a view, or a copy if it has several ranges."""
    if len(ranges) == 1:
        return buffer[ranges[0][0] : ranges[0][1]]
    return np.concatenate([buffer[start:stop] for start, stop in ranges])

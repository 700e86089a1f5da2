"""Moves pieces between runs and channels, and notices when a peer will not play its part.

Collective calls of a communicator run one after the other; messages (send/recv) run beside them. A
piece belongs to the run whose call it names. One that comes before its receive has started, while
others from its sender are awaited, is set aside; nobody asks a channel from which nothing is
awaited, so that little is ever set aside.
"""

import time
from collections import deque
from collections.abc import Iterator

from tokenmill.collectives.control import ENDED, Control
from tokenmill.collectives.executor.run import Outgoing, Run
from tokenmill.collectives.transports.channel import Bytes, Channel, Piece, Transport
from tokenmill.collectives.transports.wire import HEADER, call_number, is_message, unpack_call
from tokenmill.errors import CollectiveError

_CHECK_S = 0.002
"""Between two looks at what the control has to say."""
_NEWS_S = 0.5
"""How long a broken connection may be ahead of the news why it broke."""


class _RefusedError(Exception):
    """A run cannot go on; the message says why, without rank and call."""


class Engine:
    """What one rank does in a communicator. Driven by one thread at a time."""

    def __init__(self, control: Control, transport: Transport, timeout_s: float) -> None:
        self.rank, self.timeout_s = control.rank, timeout_s
        self.failure: CollectiveError | None = None
        self._control, self._transport = control, transport
        self._channels: dict[int, Channel] = {
            peer: transport.channel(peer) for peer in range(control.size) if peer != control.rank
        }
        self._collectives: deque[Run] = deque()
        """The first is under way."""
        self._messages: list[Run] = []
        self._aside: dict[tuple[int, bytes, int], deque[tuple[int, Bytes]]] = {}
        self._attempt = 0
        self._last_check_s = 0.0
        self._ended_s: dict[int, float] = {}
        """When the channels of peers were found to have ended."""

    @property
    def is_idle(self) -> bool:
        return not self._collectives and not self._messages

    def submit(self, run: Run) -> None:
        """Take on a run. One that cannot go on gets an error, as do all others then."""
        if self.failure is not None:
            run.error = self._broken(run)
            return
        if run.is_message:
            self._messages.append(run)
        else:
            self._collectives.append(run)
            if len(self._collectives) > 1:
                return
        self._start(run)

    def advance(self) -> None:
        """Move what can be moved; pause if nothing can. Retires runs that are done."""
        try:
            moved = False
            for run in self._current():
                for peer, queue in run.outgoing.items():
                    if queue and self._push(run, peer, queue):
                        moved = True
                for peer, num_awaited in run.num_awaited.items():
                    if num_awaited and self._pull(peer):
                        moved = True
            if moved:
                self._attempt = 0
                self._retire()
            else:
                self._pause()
        except _RefusedError as error:
            self.give_up(str(error))

    def give_up(self, reason: str) -> None:
        """End all runs with an error, and tell the other ranks why."""
        runs = [*self._collectives, *self._messages]
        what = f" in {runs[0].call}" if runs else ""
        self._control.abort(f"rank {self.rank} gave up{what}: {reason}")
        self._break(reason)

    def _break(self, reason: str) -> None:
        for run in [*self._collectives, *self._messages]:
            run.error = CollectiveError(f"rank {self.rank}: {run.call}: {reason}")
        self.failure = self.failure or CollectiveError(reason)
        self._collectives.clear()
        self._messages.clear()

    def _broken(self, run: Run) -> CollectiveError:
        return CollectiveError(
            f"rank {self.rank}: {run.call}: the communicator failed before: {self.failure}"
        )

    def _current(self) -> Iterator[Run]:
        if self._collectives:
            yield self._collectives[0]
        if self._messages:
            yield from list(self._messages)

    def _start(self, run: Run) -> None:
        try:
            if self._aside:
                self._compare_aside(run)
            run.start()
            self._take_from_aside(run)
            self._retire()
        except _RefusedError as error:
            self.give_up(str(error))

    def _retire(self) -> None:
        """Forget what is done; the next collective starts."""
        if self._messages:
            self._messages = [run for run in self._messages if not run.is_done]
        if self._collectives and self._collectives[0].is_done:
            self._collectives.popleft()
            if self._collectives:
                self._start(self._collectives[0])

    # -- sending

    def _push(self, run: Run, peer: int, queue: deque[Outgoing]) -> bool:
        """Give the channel as many pieces as it takes; True if it took any."""
        channel, num_moves = self._channels[peer], run.num_moves
        while queue:
            message = queue[0]
            size = message.payload.size
            if message.done < size:
                stop = min(size, message.done + channel.piece_bytes)
                header = HEADER.pack(run.packed, message.tag, size, stop - message.done)
                if not channel.try_send(header, message.payload[message.done : stop]):
                    break
                message.done = stop
                run.num_moves += 1
            if message.done == size:
                if not channel.flush():
                    break
                queue.popleft()
                run.num_moves += 1
                run.complete(message.step)
        return run.num_moves > num_moves

    # -- receiving

    def _pull(self, peer: int) -> bool:
        """Take in a piece from a peer; False if there is none."""
        channel = self._channels[peer]
        try:
            piece = channel.poll()
        except ValueError as error:
            raise _RefusedError(f"rank {peer} sent what is no message: {error}") from None
        if piece is None:
            return False
        run = self._run_of(peer, piece.call)
        lane = run.incoming.get((peer, piece.tag)) if run else None
        if run and lane:
            self._check_size(peer, piece.message_bytes, lane[0].num_bytes)
            is_complete = run.take(lane[0], piece.payload)
            channel.release()
            if is_complete:
                run.received(lane[0])
        else:
            self._set_aside(peer, piece)
            channel.release()
        if self._aside:
            for other in self._current():
                self._take_from_aside(other)
        return True

    def _check_size(self, peer: int, num_bytes: int, wanted: int) -> None:
        if num_bytes != wanted:
            raise _RefusedError(f"rank {peer} sent a message of {num_bytes} bytes, not {wanted}")

    def _run_of(self, peer: int, call: bytes) -> Run | None:
        """The run that a piece is for; None for one that has not started here."""
        active = self._collectives[0] if self._collectives else None
        if active and call == active.packed:
            return active
        if is_message(call):
            return self._message_run(peer, call)
        if active:
            number = call_number(call)
            is_passed_over = number > active.number and active.num_to_come.get(peer)
            if number <= active.number or is_passed_over:
                raise _RefusedError(_difference(peer, call, active))
        return None

    def _message_run(self, peer: int, call: bytes) -> Run | None:
        for run in self._messages:
            if not run.num_to_come.get(peer):
                continue
            if run.packed == call:
                return run
            theirs = unpack_call(call)
            if theirs.root == run.call.root and theirs.number == run.number:
                raise _RefusedError(_difference(peer, call, run))
        return None

    def _set_aside(self, peer: int, piece: Piece) -> None:
        key = peer, piece.call, piece.tag
        self._aside.setdefault(key, deque()).append((piece.message_bytes, piece.payload.copy()))

    def _compare_aside(self, run: Run) -> None:
        """A peer whose pieces came early may be doing something else."""
        for peer, call, _ in self._aside:
            if run.is_message or is_message(call):
                continue
            if call != run.packed and call_number(call) == run.number:
                raise _RefusedError(_difference(peer, call, run))

    def _take_from_aside(self, run: Run) -> None:
        """Give a run what came before its receives had started."""
        keys = [key for key in self._aside if key[1] == run.packed]
        while keys:
            peer, _, tag = key = keys[-1]
            lane = run.incoming.get((peer, tag))
            if not lane:
                keys.pop()
                continue
            num_bytes, payload = self._aside[key].popleft()
            self._check_size(peer, num_bytes, lane[0].num_bytes)
            if run.take(lane[0], payload):
                run.received(lane[0])
                keys = [key for key in self._aside if key[1] == run.packed]
            if not self._aside[key]:
                del self._aside[key]
                keys = [other for other in keys if other != key]

    # -- waiting

    def _pause(self) -> None:
        incoming = {p for run in self._current() for p, count in run.num_awaited.items() if count}
        outgoing = {p for run in self._current() for p, queue in run.outgoing.items() if queue}
        self._transport.wait(incoming, outgoing, self._attempt)
        self._attempt += 1
        now_s = time.monotonic()
        if self._attempt > 1 and now_s - self._last_check_s > _CHECK_S:
            self._last_check_s = now_s
            self._check_peers(incoming, outgoing)
            for run in self._current():
                self._check_time(run, now_s)

    def _check_peers(self, incoming: set[int], outgoing: set[int]) -> None:
        """Raise where others have given up, or one of those that this rank waits for is gone."""
        notices = self._control.notices()
        if notices.failure is not None:
            self._break(notices.failure)
            return
        for peer in incoming | outgoing:
            is_gone = peer in notices.gone
            is_stuck = peer in outgoing and is_gone
            if is_stuck or self._channels[peer].is_at_end(is_gone):
                ended_s = self._ended_s.setdefault(peer, self._last_check_s)
                if is_gone or self._last_check_s - ended_s > _NEWS_S:
                    raise _RefusedError(f"rank {peer} {notices.gone.get(peer, ENDED)}")

    def _check_time(self, run: Run, now_s: float) -> None:
        if run.num_moves != run.num_moves_seen:
            run.num_moves_seen, run.last_move_s = run.num_moves, now_s
        elif now_s - run.last_move_s > self.timeout_s:
            raise _RefusedError(f"{_stillness(run)} for {self.timeout_s:g} s")


def _stillness(run: Run) -> str:
    silent = [peer for peer, count in run.num_awaited.items() if count]
    if silent:
        return f"nothing has come from rank {', '.join(map(str, sorted(silent)))}"
    stuck = [peer for peer, queue in run.outgoing.items() if queue]
    return f"rank {', '.join(map(str, sorted(stuck)))} has taken nothing"


def _difference(peer: int, packed: bytes, run: Run) -> str:
    """What a peer does that this rank does not."""
    try:
        theirs = unpack_call(packed)
    except ValueError:
        return f"rank {peer} sent what is no message of ours"
    if str(theirs) == str(run.call):
        return f"rank {peer} does it by another algorithm, or with blocks of other sizes"
    return f"rank {peer} does {theirs} instead"

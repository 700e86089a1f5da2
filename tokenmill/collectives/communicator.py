"""A group of ranks as a program sees it: NCCL's and MPI's operations, over NumPy arrays.

    with connect("127.0.0.1:29500", rank=rank, size=4) as ranks:
        ranks.all_reduce(gradients, "avg")

All ranks make the same calls in the same order; send and recv concern two ranks alone. A call
returns when its work is done, or with `is_async` at once, with a `Work` to wait for. Arrays may
have any shape; one that is not contiguous is copied and, where it is a result, copied back.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import numpy as np

from tokenmill.collectives.arithmetic import (
    Array,
    check_reduction,
    data_type,
    data_type_of,
    divide,
)
from tokenmill.collectives.calls import Choose, Preparer, Request
from tokenmill.collectives.choice import choose_plan
from tokenmill.collectives.control import Control
from tokenmill.collectives.executor.dispatch import Dispatcher, Work
from tokenmill.collectives.executor.engine import Engine
from tokenmill.collectives.executor.run import Run
from tokenmill.collectives.layout import Layout
from tokenmill.collectives.program import Plan
from tokenmill.collectives.topology import Topology
from tokenmill.collectives.transports.channel import Transport
from tokenmill.errors import CollectiveError, UsageError

_Finish = Callable[[], None]
_TOKEN = data_type("u8")


class Communicator:
    """One rank's view of the group. Made by `connect` and its likes; raises CollectiveError when an
    operation fails, after which it fails for good on all ranks.

    Operations take `algorithm` and `slices` (by default chosen by size and topology), or a whole
    `plan`; all ranks must give the same. `is_ordered` asks for a reduction in order of rank, whose
    bits depend neither on size nor on algorithm.
    """

    def __init__(
        self,
        control: Control,
        transport: Transport,
        layout: Layout,
        *,
        timeout_s: float,
        choose: Choose = choose_plan,
    ) -> None:
        self.rank, self.size = control.rank, control.size
        self.layout, self.transport_name, self.timeout_s = layout, transport.name, timeout_s
        self._control, self._transport = control, transport
        engine = Engine(control, transport, timeout_s)
        self._dispatcher = Dispatcher(engine, f"rank {self.rank}")
        self._preparer = Preparer(layout, self.rank, choose)
        self._num_calls = 0
        self._num_messages: dict[tuple[int, int, int], int] = {}
        self._is_closed = False

    @property
    def topology(self) -> Topology:
        return self.layout.topology

    def plan_of(self, request: Request) -> Plan:
        """How a request would be done."""
        return self._preparer.prepare(request).plan

    # -- operations

    def all_reduce(
        self,
        array: Array,
        op: str = "sum",
        *,
        plan: Plan | None = None,
        algorithm: str | None = None,
        slices: int | None = None,
        is_ordered: bool = False,
        is_async: bool = False,
    ) -> Work | None:
        """array := the reduction of all ranks' arrays."""
        check_reduction(op)
        data, copy_back = _in_place(array)
        request = Request(
            "all_reduce",
            data.size,
            data_type_of(array),
            op,
            plan=plan,
            algorithm=algorithm,
            slices=slices,
            is_ordered=is_ordered,
        )
        finish = self._finish(op, data, request, copy_back)
        return self._do(request, {"data": data}, finish, array, is_async)

    def reduce(
        self,
        array: Array,
        root: int = 0,
        op: str = "sum",
        *,
        plan: Plan | None = None,
        algorithm: str | None = None,
        slices: int | None = None,
        is_ordered: bool = False,
        is_async: bool = False,
    ) -> Work | None:
        """At root, array := the reduction; elsewhere it stays as it is."""
        check_reduction(op)
        request = Request(
            "reduce",
            array.size,
            data_type_of(array),
            op,
            root,
            plan=plan,
            algorithm=algorithm,
            slices=slices,
            is_ordered=is_ordered,
        )
        if self.rank != root:
            return self._do(request, {"data": array.flatten()}, None, array, is_async)
        data, copy_back = _in_place(array)
        finish = self._finish(op, data, request, copy_back)
        return self._do(request, {"data": data}, finish, array, is_async)

    def broadcast(
        self,
        array: Array,
        root: int = 0,
        *,
        plan: Plan | None = None,
        algorithm: str | None = None,
        slices: int | None = None,
        is_async: bool = False,
    ) -> Work | None:
        """array := root's array."""
        data, copy_back = _in_place(array)
        request = Request(
            "broadcast",
            data.size,
            data_type_of(array),
            root=root,
            plan=plan,
            algorithm=algorithm,
            slices=slices,
        )
        return self._do(request, {"data": data}, copy_back, array, is_async)

    def all_gather(
        self,
        output: Array,
        block: Array,
        *,
        counts: Sequence[int] = (),
        plan: Plan | None = None,
        algorithm: str | None = None,
        slices: int | None = None,
        is_async: bool = False,
    ) -> Work | None:
        """output := the blocks of all ranks, one after the other.

        `counts` are their sizes where these differ. `block` may lie in its place in `output`.
        """
        data, copy_back = _in_place(output)
        _check_same(output, block)
        request = Request(
            "all_gather",
            data.size,
            data_type_of(output),
            counts=self._block_counts("all_gather", output, block, counts),
            plan=plan,
            algorithm=algorithm,
            slices=slices,
        )
        start, stop = self._preparer.prepare(request).task.block(self.rank)
        data[start:stop] = block.reshape(-1)
        return self._do(request, {"data": data}, copy_back, output, is_async)

    def reduce_scatter(
        self,
        output: Array,
        array: Array,
        op: str = "sum",
        *,
        counts: Sequence[int] = (),
        plan: Plan | None = None,
        algorithm: str | None = None,
        slices: int | None = None,
        is_ordered: bool = False,
        is_async: bool = False,
    ) -> Work | None:
        """output := this rank's block of the reduction of all ranks' arrays.

        `counts` are the blocks' sizes where these differ. `array` stays as it is.
        """
        check_reduction(op)
        _check_same(output, array)
        request = Request(
            "reduce_scatter",
            array.size,
            data_type_of(array),
            op,
            counts=self._block_counts("reduce_scatter", array, output, counts),
            plan=plan,
            algorithm=algorithm,
            slices=slices,
            is_ordered=is_ordered,
        )
        start, stop = self._preparer.prepare(request).task.block(self.rank)
        data = array.flatten()

        def copy_out() -> None:
            output[...] = data[start:stop].reshape(output.shape)

        finish = self._finish(op, data[start:stop], request, copy_out)
        return self._do(request, {"data": data}, finish, output, is_async)

    def all_to_all(
        self,
        output: Array,
        array: Array,
        *,
        send_counts: Sequence[int] = (),
        receive_counts: Sequence[int] = (),
        plan: Plan | None = None,
        algorithm: str | None = None,
        slices: int | None = None,
        is_async: bool = False,
    ) -> Work | None:
        """Rank i's block j goes to rank j, which has it as block i of `output`.

        `send_counts` and `receive_counts` are the sizes of this rank's blocks where they differ.
        """
        _check_same(output, array)
        counts = self._all_to_all_counts(output, array, send_counts, receive_counts)
        request = Request(
            "all_to_all",
            array.size,
            data_type_of(array),
            counts=counts,
            plan=plan,
            algorithm=algorithm,
            slices=slices,
        )
        data, copy_back = _in_place(output)
        source = np.ascontiguousarray(array).reshape(-1)
        return self._do(request, {"input": source, "output": data}, copy_back, output, is_async)

    def send(self, array: Array, peer: int, *, tag: int = 0, is_async: bool = False) -> Work | None:
        """A message to a peer, which receives it as the next from here with this tag."""
        self._check_peer("send", peer, tag)
        data = np.ascontiguousarray(array).reshape(-1)
        request = Request("send_recv", data.size, data_type_of(array), None, self.rank, peer, tag)
        return self._do(request, {"data": data}, None, array, is_async)

    def recv(self, array: Array, peer: int, *, tag: int = 0, is_async: bool = False) -> Work | None:
        """array := the next message from a peer with this tag."""
        self._check_peer("recv", peer, tag)
        data, copy_back = _in_place(array)
        request = Request("send_recv", data.size, data_type_of(array), None, peer, self.rank, tag)
        return self._do(request, {"data": data}, copy_back, array, is_async)

    def barrier(self, *, is_async: bool = False) -> Work | None:
        """Return when all ranks have come here."""
        return self._do(Request("barrier", 0, _TOKEN), {}, None, None, is_async)

    def close(self) -> None:
        """Leave the group. Others that still wait for this rank fail; those that do not, do not."""
        if not self._is_closed:
            self._is_closed = True
            self._dispatcher.close()
            self._control.close()
            self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, CollectiveError) and not self._is_closed:
            self._control.abort(f"rank {self.rank} gave up: {type(error).__name__} {error}".strip())
        self.close()

    # -- what they share

    def _do(
        self,
        request: Request,
        buffers: dict[str, Array],
        finish: _Finish | None,
        result: Array | None,
        is_async: bool,
    ) -> Work | None:
        if self._is_closed:
            raise CollectiveError(f"rank {self.rank}: {request.op}: the communicator is closed")
        prepared = self._preparer.prepare(request)
        packed = prepared.packed(self._next_number(request))
        run = Run(packed, prepared.schedule, buffers, prepared.dtype, prepared.reduce, finish)
        if is_async:
            return self._dispatcher.submit(run, result)
        self._dispatcher.run(run)
        return None

    def _next_number(self, request: Request) -> int:
        if request.op != "send_recv":
            self._num_calls += 1
            return self._num_calls
        key = request.root, request.peer, request.tag
        number = self._num_messages.get(key, 0) + 1
        self._num_messages[key] = number
        return number

    def _finish(
        self, op: str, result: Array, request: Request, then: _Finish | None
    ) -> _Finish | None:
        """What is to be done when all steps are: divide for an average, and copy."""
        if op != "avg":
            return then

        def finish() -> None:
            divide(result, request.dtype, self.size)
            if then:
                then()

        return finish

    def _block_counts(
        self, op: str, whole: Array, block: Array, counts: Sequence[int]
    ) -> tuple[int, ...]:
        """Sizes of the ranks' blocks; empty if all are alike. Raises UsageError."""
        where = f"rank {self.rank}: {op}"
        if not counts:
            if block.size * self.size != whole.size:
                raise UsageError(
                    f"{where}: {self.size} blocks of {block.size} elements are not {whole.size}: "
                    "give the sizes of all blocks if they differ"
                )
            return ()
        if len(counts) != self.size:
            raise UsageError(f"{where}: {len(counts)} sizes of blocks for {self.size} ranks")
        if counts[self.rank] != block.size:
            raise UsageError(
                f"{where}: the block has {block.size} elements, not {counts[self.rank]}"
            )
        return tuple(counts)

    def _all_to_all_counts(
        self, output: Array, array: Array, sent: Sequence[int], received: Sequence[int]
    ) -> tuple[int, ...]:
        """The matrix of sizes with this rank's row and column; empty if all blocks are alike."""
        where = f"rank {self.rank}: all_to_all"
        if not sent and not received:
            if array.size % self.size or output.size != array.size:
                raise UsageError(
                    f"{where}: {array.size} elements to {self.size} ranks and {output.size} from "
                    "them: give the sizes of the blocks if they differ"
                )
            return ()
        sent = sent or [array.size // self.size] * self.size
        received = received or [output.size // self.size] * self.size
        for name, sizes, total in (("sent", sent, array.size), ("received", received, output.size)):
            if len(sizes) != self.size or sum(sizes) != total:
                raise UsageError(
                    f"{where}: blocks of {', '.join(map(str, sizes))} elements are to be {name}, "
                    f"which is not {total} in {self.size} blocks"
                )
        if sent[self.rank] != received[self.rank]:
            raise UsageError(
                f"{where}: {sent[self.rank]} elements to oneself, but {received[self.rank]} from "
                "oneself"
            )
        matrix = np.zeros((self.size, self.size), np.int64)
        matrix[self.rank, :] = sent
        matrix[:, self.rank] = received
        return tuple(matrix.reshape(-1).tolist())

    def _check_peer(self, op: str, peer: int, tag: int) -> None:
        if not 0 <= peer < self.size or peer == self.rank:
            raise UsageError(
                f"rank {self.rank}: {op}: the peer is {peer}, but must be another of 0 to "
                f"{self.size - 1}"
            )
        if not 0 <= tag < 1 << 32:
            raise UsageError(f"rank {self.rank}: {op}: the tag is {tag}, but must be in 32 bits")


def _in_place(array: Array) -> tuple[Array, _Finish | None]:
    """A contiguous vector with the array's elements, and how to bring a copy back."""
    if not array.flags.writeable:
        raise UsageError("the array is read-only, but is to hold a result")
    if array.flags.c_contiguous:
        return array.reshape(-1), None
    data = array.flatten()

    def copy_back() -> None:
        array[...] = data.reshape(array.shape)

    return data, copy_back


def _check_same(one: Array, other: Array) -> None:
    if one.dtype != other.dtype:
        raise UsageError(f"elements are of type {one.dtype} here and {other.dtype} there")


__all__ = ["Communicator", "Work"]

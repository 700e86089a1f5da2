"""The backend "tokenmill" of torch.distributed, for tensors on the CPU.

    import tokenmill.collectives.torch.backend
    torch.distributed.init_process_group("tokenmill")

A process group is a communicator (`ProcessGroup` is subclassed, as torch wants it of groups in
Python). It meets through torch's store, which only tells where rank 0 of the group listens.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tokenmill.collectives.communicator import Communicator
from tokenmill.collectives.connect import connect_over, make_introduced_control
from tokenmill.collectives.torch.meeting import listening_address
from tokenmill.collectives.torch.tensors import as_array, as_movable
from tokenmill.collectives.torch.works import TorchWork
from tokenmill.errors import UsageError

Tensor = torch.Tensor
_ADDRESS_KEY = "tokenmill/address"
_REDUCTIONS = {
    dist.ReduceOp.SUM: "sum",
    dist.ReduceOp.AVG: "avg",
    dist.ReduceOp.PRODUCT: "prod",
    dist.ReduceOp.MAX: "max",
    dist.ReduceOp.MIN: "min",
}


class TokenmillProcessGroup(dist.ProcessGroup):
    """torch's operations over a communicator. Names and arguments are torch's."""

    def __init__(self, communicator: Communicator) -> None:
        super().__init__(communicator.rank, communicator.size)
        self.communicator = communicator
        self._name, self._desc = "", ""

    # -- what torch asks of every group

    def getBackendName(self) -> str:  # noqa: N802
        return "tokenmill"

    def getGroupName(self) -> str:  # noqa: N802
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._name = name

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._desc

    def setGroupDesc(self, desc: str) -> None:  # noqa: N802
        self._desc = desc

    _set_group_name, _set_group_desc = setGroupName, setGroupDesc

    @property
    def group_name(self) -> str:
        return self._name

    @property
    def group_desc(self) -> str:
        return self._desc

    @property
    def pg_name(self) -> str:
        return self._name

    def shutdown(self) -> None:
        self.communicator.close()

    abort = shutdown

    # -- reductions

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> TorchWork:
        op, is_async = _options(opts)
        return self._each(
            tensors, lambda t: self.communicator.all_reduce(as_array(t), op, is_async=is_async)
        )

    allreduce_coalesced = allreduce

    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> TorchWork:
        op, is_async = _options(opts)
        return self._each(
            tensors,
            lambda t: self.communicator.reduce(as_array(t), opts.rootRank, op, is_async=is_async),
        )

    def reduce_scatter_single(self, output: Tensor, source: Tensor, opts: Any = None) -> TorchWork:
        op, is_async = _options(opts)
        work = self.communicator.reduce_scatter(
            as_array(output), as_array(source), op, is_async=is_async
        )
        return TorchWork([work], [output])

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], sources: Sequence[Tensor], opts: Any = None
    ) -> TorchWork:
        op, is_async = _options(opts)
        works = [
            self.communicator.reduce_scatter(
                as_array(output), as_array(source), op, is_async=is_async
            )
            for output, source in zip(outputs, sources, strict=True)
        ]
        return TorchWork(works, list(outputs))

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def reduce_scatter(
        self, outputs: Sequence[Tensor], sources: Sequence[Sequence[Tensor]], opts: Any = None
    ) -> TorchWork:
        op, is_async = _options(opts)
        works = [
            self.communicator.reduce_scatter(
                as_array(output),
                as_array(torch.cat([t.reshape(-1) for t in blocks])),
                op,
                counts=[t.numel() for t in blocks],
                is_async=is_async,
            )
            for output, blocks in zip(outputs, sources, strict=True)
        ]
        return TorchWork(works, list(outputs))

    # -- movements

    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> TorchWork:
        _, is_async = _options(opts)
        root = opts.rootRank
        return self._each(
            tensors, lambda t: self.communicator.broadcast(as_movable(t), root, is_async=is_async)
        )

    def all_gather_single(self, output: Tensor, source: Tensor, opts: Any = None) -> TorchWork:
        _, is_async = _options(opts)
        work = self.communicator.all_gather(
            as_movable(output), as_movable(source), is_async=is_async
        )
        return TorchWork([work], [output])

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], sources: Sequence[Tensor], opts: Any = None
    ) -> TorchWork:
        _, is_async = _options(opts)
        works = [
            self.communicator.all_gather(as_movable(output), as_movable(source), is_async=is_async)
            for output, source in zip(outputs, sources, strict=True)
        ]
        return TorchWork(works, list(outputs))

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def allgather(
        self, outputs: Sequence[Sequence[Tensor]], sources: Sequence[Tensor], opts: Any = None
    ) -> TorchWork:
        _, is_async = _options(opts)
        works, copies = [], []
        for blocks, source in zip(outputs, sources, strict=True):
            whole = torch.empty(sum(t.numel() for t in blocks), dtype=source.dtype)
            sizes = [as_movable(t).size for t in blocks]
            work = self.communicator.all_gather(
                as_movable(whole), as_movable(source), counts=sizes, is_async=is_async
            )
            works.append(work)
            copies.append(_copies(blocks, whole))
        return TorchWork(works, [t for blocks in outputs for t in blocks], copies)

    def all_to_all_single(
        self,
        output: Tensor,
        source: Tensor,
        output_sizes: Sequence[int] = (),
        source_sizes: Sequence[int] = (),
        opts: Any = None,
    ) -> TorchWork:
        _, is_async = _options(opts)
        work = self.communicator.all_to_all(
            as_movable(output),
            as_movable(source),
            send_counts=_row_counts(source, source_sizes),
            receive_counts=_row_counts(output, output_sizes),
            is_async=is_async,
        )
        return TorchWork([work], [output])

    alltoall_base = all_to_all_single

    def alltoall(
        self, outputs: Sequence[Tensor], sources: Sequence[Tensor], opts: Any = None
    ) -> TorchWork:
        _, is_async = _options(opts)
        return self._exchange(list(outputs), list(sources), is_async)

    def gather(
        self, outputs: Sequence[Sequence[Tensor]], sources: Sequence[Tensor], opts: Any
    ) -> TorchWork:
        _, is_async = _options(opts)
        source, nothing = sources[0], sources[0].new_empty(0)
        sent = [source if rank == opts.rootRank else nothing for rank in range(self.size())]
        received = list(outputs[0]) if self.rank() == opts.rootRank else [nothing] * self.size()
        return self._exchange(received, sent, is_async)

    def scatter(
        self, outputs: Sequence[Tensor], sources: Sequence[Sequence[Tensor]], opts: Any
    ) -> TorchWork:
        _, is_async = _options(opts)
        output, nothing = outputs[0], outputs[0].new_empty(0)
        received = [output if rank == opts.rootRank else nothing for rank in range(self.size())]
        sent = list(sources[0]) if self.rank() == opts.rootRank else [nothing] * self.size()
        return self._exchange(received, sent, is_async)

    def send(self, tensors: Sequence[Tensor], peer: int, tag: int = 0) -> TorchWork:
        return self._each(
            tensors, lambda t: self.communicator.send(as_movable(t), peer, tag=tag, is_async=True)
        )

    def recv(self, tensors: Sequence[Tensor], peer: int, tag: int = 0) -> TorchWork:
        return self._each(
            tensors, lambda t: self.communicator.recv(as_movable(t), peer, tag=tag, is_async=True)
        )

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> TorchWork:
        raise UsageError("tokenmill's backend receives from a rank that is named: give `src`")

    def barrier(self, opts: Any = None) -> TorchWork:
        _, is_async = _options(opts)
        return TorchWork([self.communicator.barrier(is_async=is_async)], [])

    # -- what they share

    def _each(self, tensors: Sequence[Tensor], begin: Callable[[Tensor], Any]) -> TorchWork:
        return TorchWork([begin(t) for t in tensors], list(tensors))

    def _exchange(self, received: list[Tensor], sent: list[Tensor], is_async: bool) -> TorchWork:
        """All-to-all of blocks that are tensors of their own."""
        source = torch.cat([t.reshape(-1) for t in sent])
        whole = source.new_empty(sum(t.numel() for t in received))
        work = self.communicator.all_to_all(
            as_movable(whole),
            as_movable(source),
            send_counts=[as_movable(t).size for t in sent],
            receive_counts=[as_movable(t).size for t in received],
            is_async=is_async,
        )
        return TorchWork([work], received, [_copies(received, whole)])


def _options(opts: Any) -> tuple[str, bool]:
    """The reduction, where there is one, and whether the call is asynchronous."""
    if opts is None:
        return "sum", True
    reduce_op = getattr(opts, "reduceOp", dist.ReduceOp.SUM)
    for known, name in _REDUCTIONS.items():
        if reduce_op == known:
            return name, opts.asyncOp
    raise UsageError(f"tokenmill's backend has no reduction {reduce_op}: give sum, avg, prod, ...")


def _copies(blocks: Sequence[Tensor], whole: Tensor) -> Callable[[], None]:
    def copy() -> None:
        parts = whole.split([t.numel() for t in blocks])
        for block, part in zip(blocks, parts, strict=True):
            block.copy_(part.view(block.shape))

    return copy


def _row_counts(tensor: Tensor, rows: Sequence[int]) -> list[int]:
    """Elements as they travel, from sizes in rows of the first dimension."""
    if not rows:
        return []
    per_row = as_movable(tensor).size // max(1, tensor.shape[0])
    return [count * per_row for count in rows]


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> TokenmillProcessGroup:
    timeout_s = timeout.total_seconds()
    control = make_introduced_control(
        lambda text: store.set(_ADDRESS_KEY, text),
        lambda: str(store.get(_ADDRESS_KEY), "utf-8"),
        rank=rank,
        size=size,
        timeout_s=timeout_s,
        address=listening_address(),
    )
    return TokenmillProcessGroup(connect_over(control, timeout_s=timeout_s))


dist.Backend.register_backend("tokenmill", _create, devices=["cpu"])

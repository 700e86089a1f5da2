"""From an operation and its arguments to a run: task, plan, schedule, all worked out once.

All ranks must come to the same plan; they do, because it depends on what they agree on alone.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from tokenmill.collectives.arithmetic import DataType, Reduce, make_reducer
from tokenmill.collectives.catalog import write_rank
from tokenmill.collectives.executor.schedule import Schedule, make_schedule
from tokenmill.collectives.layout import Layout
from tokenmill.collectives.program import Plan
from tokenmill.collectives.task import Task
from tokenmill.collectives.transports.wire import Call, digest_of

_MOST_PREPARED = 512


class Choose(Protocol):
    """Finds a plan for a task on a layout; the same on all ranks."""

    def __call__(
        self,
        task: Task,
        layout: Layout,
        num_bytes: int,
        *,
        algorithm: str | None,
        slices: int | None,
        is_ordered: bool,
    ) -> Plan: ...


class Request(NamedTuple):
    """What was asked for, in one word that can be looked up. `root` and `peer` as in Task."""

    op: str
    num_elements: int
    dtype: DataType
    reduction: str | None = None
    root: int = 0
    peer: int = 0
    tag: int = 0
    counts: tuple[int, ...] = ()
    plan: Plan | None = None
    algorithm: str | None = None
    slices: int | None = None
    is_ordered: bool = False


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that calls with one request have in common."""

    task: Task
    plan: Plan
    schedule: Schedule
    dtype: DataType
    reduce: Reduce | None
    packed_rest: bytes
    """The packed call without its number."""

    def packed(self, number: int) -> bytes:
        return number.to_bytes(8, "little") + self.packed_rest


class Preparer:
    """Prepares requests of one rank, and remembers the latest."""

    def __init__(self, layout: Layout, rank: int, choose: Choose) -> None:
        self._layout, self._rank, self._choose = layout, rank, choose
        self._known: OrderedDict[Request, Prepared] = OrderedDict()

    def prepare(self, request: Request) -> Prepared:
        """Raises UsageError for what cannot be done."""
        found = self._known.get(request)
        if found is None:
            found = self._known[request] = self._make(request)
            if len(self._known) > _MOST_PREPARED:
                self._known.popitem(last=False)
        return found

    def _make(self, request: Request) -> Prepared:
        task = Task(
            op=request.op,
            ranks=self._layout.topology.ranks,
            count=request.num_elements,
            root=request.root,
            peer=request.peer,
            counts=request.counts,
        )
        plan = request.plan or self._choose_plan(request, task)
        return Prepared(
            task=task,
            plan=plan,
            schedule=make_schedule(write_rank(task, plan, self._rank)),
            dtype=request.dtype,
            reduce=make_reducer(request.reduction, request.dtype) if request.reduction else None,
            packed_rest=self._call(request, plan).pack()[8:],
        )

    def _choose_plan(self, request: Request, task: Task) -> Plan:
        num_bytes = request.num_elements * request.dtype.numpy.itemsize
        plan = self._choose(
            task,
            self._layout,
            num_bytes,
            algorithm=request.algorithm,
            slices=request.slices,
            is_ordered=request.is_ordered,
        )
        return replace(plan, order=self._layout.order)

    def _call(self, request: Request, plan: Plan) -> Call:
        """What peers compare. A rank of all-to-all knows its own row and column of sizes alone."""
        is_message = request.op == "send_recv"
        has_own_sizes = request.op == "all_to_all" and bool(request.counts)
        return Call(
            number=0,
            op=request.op,
            dtype=request.dtype.name,
            reduction=request.reduction,
            root=request.tag if is_message else request.root,
            count=0 if has_own_sizes else request.num_elements,
            digest=digest_of(plan, () if has_own_sizes else request.counts),
        )

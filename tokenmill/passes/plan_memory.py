"""Give every value of a function a place in the arena, and reuse what is free.

Values live from the node that makes them to the last that reads them. Because threads are level
only at barriers, a place is handed on only after a barrier behind its last use. A result may take
over the place of an operand that dies at its node, where the backend says that it may, and where
no other thread can still be reading the operand for an earlier node.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tokenmill.ir.graph import Function, Node
from tokenmill.passes.place_barriers import split_of

ALIGN = 64


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Offsets in bytes by value name, and the size of the whole."""

    offsets: dict[str, int]
    size_bytes: int


@dataclass
class _Arena:
    """Free ranges, first fit."""

    free: list[tuple[int, int]]
    top: int

    def take(self, size: int) -> int:
        for index, (start, length) in enumerate(self.free):
            if length >= size:
                self.free[index] = (start + size, length - size)
                return start
        start, self.top = self.top, self.top + size
        return start

    def give(self, start: int, size: int) -> None:
        merged: list[tuple[int, int]] = []
        for place, length in sorted([*self.free, (start, size)]):
            if merged and sum(merged[-1]) == place:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            elif length:
                merged.append((place, length))
        self.free = merged


def plan_memory(
    function: Function,
    sizes: dict[str, int],
    *,
    start: int = 0,
    fixed: dict[str, int] | None = None,
    takes_over: Callable[[Node], Iterable[tuple[str, str]]] = lambda node: (),
) -> MemoryPlan:
    """`sizes` gives the bytes of each value that needs a place.

    `fixed` are places outside this arena that some values have already; results may take them
    over too. `takes_over(node)` names (result, operand) pairs that may share a place.
    """
    last_use = _last_uses(function)
    offsets = dict(fixed or {})
    outside = set(offsets.values())
    owned = {name: sizes[name] for name in offsets}
    arena = _Arena([], start)
    dying: list[str] = []
    readers: dict[str, set[str]] = {}  # since the last barrier: how they split their work
    for index, node in enumerate(function.nodes):
        if node.op == "barrier":
            for name in dying:
                size = owned.pop(name)
                if offsets[name] not in outside:
                    arena.give(offsets[name], size)
            dying = []
            readers = {}
            continue
        split = split_of(node)
        moved = dict(takes_over(node))
        for value in node.results:
            if value.name not in sizes or value.name in offsets:
                continue
            size = -(-sizes[value.name] // ALIGN) * ALIGN
            source = moved.get(value.name, "")
            is_last = source in owned and last_use[source] == index
            if is_last and owned[source] >= size and readers.get(source, {split}) == {split}:
                offsets[value.name] = offsets[source]
                owned[value.name] = owned.pop(source)
            else:
                offsets[value.name] = arena.take(size)
                owned[value.name] = size
        for name in node.operands:
            readers.setdefault(name, set()).add(split)
        dying += [n for n in owned if last_use.get(n, -1) <= index and n not in dying]
    return MemoryPlan(offsets=offsets, size_bytes=arena.top)


def _last_uses(function: Function) -> dict[str, int]:
    """The index of the last node that reads or makes each value; returned ones never die."""
    last: dict[str, int] = {}
    for index, node in enumerate(function.nodes):
        for name in (*node.operands, *(v.name for v in node.results)):
            last[name] = index
    last.update((name, len(function.nodes)) for name in function.returns)
    return last

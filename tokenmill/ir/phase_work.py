"""What a phase must do at the least: its arithmetic, and the bytes that cross its border."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from tokenmill.ir.graph import Node, Type
from tokenmill.ir.ops import Sizes
from tokenmill.ir.work import flops, moved_bytes, size_bytes


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations, bytes, and how many of the former each of the latter must pay for."""

    flops: int
    size_bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs a byte: the x axis of the roofline model (Williams, Waterman, Patterson 2009)."""
        return self.flops / self.size_bytes


def phase_work(node: Node, types: Mapping[str, Type], sizes: Sizes, *, cache: str) -> Work:
    """The work of a node, plain or fused, whose function's values have these types.

    What a fused node makes and uses itself moves no bytes; what several of its parts read is
    read once. `cache` is the type in which keys and values are stored.
    """
    leaves = node.leaves
    operands = [[types[name] for name in leaf.operands] for leaf in leaves]
    moved = sum(
        moved_bytes(leaf, kinds, sizes, cache=cache)
        for leaf, kinds in zip(leaves, operands, strict=True)
    )
    made = [v for leaf in leaves for v in leaf.results]
    seen = {v.name for v in node.results}
    reads = Counter(name for leaf in leaves for name in leaf.operands)
    for value in made:
        if value.name not in seen:
            moved -= size_bytes(value.type, sizes)
        moved -= reads.pop(value.name, 0) * size_bytes(value.type, sizes)
    moved -= sum((n - 1) * size_bytes(types[name], sizes) for name, n in reads.items())
    total = sum(flops(leaf, kinds, sizes) for leaf, kinds in zip(leaves, operands, strict=True))
    return Work(flops=total, size_bytes=moved)

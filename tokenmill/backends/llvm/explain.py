"""What the compiler makes of one phase: LLVM IR and assembly, for people to read."""

from collections.abc import Iterator
from dataclasses import dataclass

from tokenmill.backends.llvm.compile import assembly, optimized_ir
from tokenmill.backends.llvm.emit import Module
from tokenmill.backends.llvm.lower import Options, lower_alone, segments_in
from tokenmill.backends.llvm.lower_linear import LINEARS, Segment
from tokenmill.backends.llvm.tiles import Tile, emit_tile
from tokenmill.ir.graph import Function, Graph, Node
from tokenmill.ir.order import GROUP

_ROWS = 1
"""Rows of the tile kernels that are shown: those of a single sequence that decodes."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """One native function: what it is for, its IR after LLVM's clean-up, and its assembly."""

    symbol: str
    role: str
    ir: str
    assembly: str


def explain_phase(
    graph: Graph, function: Function, node: Node, value: str, options: Options
) -> list[Listing]:
    """The native functions that compute `value`, one of those that `node` makes.

    `graph` has been through all passes; `node` is one of `function`, which is one of the graph.
    """
    module = lower_alone(graph, options, node)
    wanted = dict(_functions(graph, function, node, value))
    kernels = Module("kernels")
    roles = {}
    for tile in _tiles(function, node, value):
        kernel = emit_tile(kernels, options.row, tile, _ROWS)
        roles[kernel.name] = (
            f"the tile kernel: the dot products of one token's row of {tile.dot} activations with "
            f"{32 * tile.pairs} rows of {tile.format} weights"
        )
    for made in module.functions:
        made.public = made.name in ("step", function.name)  # so that LLVM keeps it
    return [
        *_listings(kernels, roles, options),
        *_listings(module, wanted, options),
    ]


def _listings(module: Module, roles: dict[str, str], options: Options) -> Iterator[Listing]:
    text = str(module)
    for symbol, role in roles.items():
        yield Listing(
            symbol=symbol,
            role=role,
            ir=_without_comments(optimized_ir(text, options.row, symbol)),
            assembly=_without_directives(assembly(text, options.row, symbol)),
        )


def _functions(
    graph: Graph, function: Function, node: Node, value: str
) -> Iterator[tuple[str, str]]:
    """The symbols of a phase beside its kernels, and what each is for."""
    caller = "step" if function is graph.main else function.name
    for segment in segments_in(function, node):
        if _makes(segment, value):
            name = segment.linears[0].result.name[1:]
            yield f"{caller}.{name}.finish", "the epilogue: what is done with a tile's results"
    if node.op == "sample":
        yield "sample_row", "the sampler: one row of logits becomes a token"
    is_linear = any(leaf.op in LINEARS for leaf in node.leaves)
    work = "gives its share of the outputs to the kernel" if is_linear else "computes its share"
    yield caller, f"the phase: each thread {work}"


def _tiles(function: Function, node: Node, value: str) -> Iterator[Tile]:
    """The kernels that one row takes for a value."""
    types = function.values
    made = []
    for segment in segments_in(function, node):
        if _makes(segment, value):
            x, weight = (types[name] for name in segment.linears[0].operands[:2])
            groups = -(-int(weight.shape[1]) // GROUP)
            pairs = len(segment.linears)
            made.append(Tile(format=weight.dtype, dot=x.dtype, groups=groups, pairs=pairs))
    yield from dict.fromkeys(made)


def _makes(segment: Segment, value: str) -> bool:
    nodes = (*segment.linears, *segment.epilogue.nodes)
    return any(v.name == value for node in nodes for v in node.results)


def _without_comments(ir: str) -> str:
    """The definition alone."""
    return ir[ir.index("define ") :].strip()


def _without_directives(text: str) -> str:
    """Labels and instructions only."""
    lines = (line.expandtabs(8) for line in text.splitlines())
    return "\n".join(line for line in lines if line.strip() and not line.startswith("        ."))

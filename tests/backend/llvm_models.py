"""Compiles a graph for the tests, as the loader does for a checkpoint."""

from collections.abc import Mapping

from tests.unit.llvm.native import row_named
from tokenmill.backends.base import StepLimits
from tokenmill.backends.llvm.lower import Options
from tokenmill.backends.llvm.memory import Arena
from tokenmill.backends.llvm.model import LlvmModel
from tokenmill.backends.llvm.objects import ObjectCache
from tokenmill.backends.llvm.program import CompiledProgram, Numerics, compile_program
from tokenmill.backends.llvm.target import pick_row
from tokenmill.backends.llvm.weights import PackedWeights
from tokenmill.ir.formats import Weight
from tokenmill.ir.graph import Graph
from tokenmill.passes.return_hidden import return_hidden


def make_llvm_model(
    graph: Graph,
    weights: Mapping[str, Weight],
    *,
    limits: StepLimits,
    objects: ObjectCache,
    activations: str = "f32",
    cache: str = "f32",
    threads: int = 2,
    row: str | None = None,
    has_pooling: bool = False,
) -> LlvmModel:
    """A model of a graph that no pass has seen; its code is sought in and added to `objects`.

    `has_pooling`: a decoder's states are wanted too, for which a second program is made.
    """
    kinds = graph.weights()
    formats = {n: w.format for n, w in weights.items() if kinds[n].dtype == "w"}
    options = Options(
        row=row_named(row) if row else pick_row(),
        activations=activations,
        max_tokens=limits.tokens,
        max_rows=limits.rows,
    )
    numerics = Numerics(activations=activations, cache=cache)
    program = compile_program(graph, formats, numerics, options, objects)
    shapes = {n: tuple(int(d) for d in kind.shape) for n, kind in kinds.items()}
    packed = PackedWeights.plan(program.program, shapes)
    arena = Arena(packed.size_bytes)
    for name, weight in weights.items():
        packed.pack(arena, name, weight)

    def make_pooling() -> CompiledProgram:
        return compile_program(return_hidden(graph), formats, numerics, options, objects)

    return LlvmModel(
        program,
        packed,
        arena,
        limits=limits,
        threads=threads,
        make_pooling=make_pooling if has_pooling else None,
    )

"""The life of one value, part by part, as `tokenmill explain` tells it."""

import inspect
import linecache
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tokenmill.backends.llvm.explain import Listing, explain_phase
from tokenmill.backends.llvm.lower import Options
from tokenmill.backends.llvm.target import Row
from tokenmill.cli.listing import Style, heart_of, indented, wrapped
from tokenmill.cli.subject import NamedValue, Subject, named_values
from tokenmill.config import EngineConfig
from tokenmill.ir.graph import Graph
from tokenmill.ir.ops import OPS
from tokenmill.ir.phase_work import phase_work
from tokenmill.models.provenance import SourceLine
from tokenmill.passes.history import Stage, node_of, trace_value
from tokenmill.passes.pipeline import NamedPass

_STEPS = {
    "the next token behind 128 others": {"T": 1, "R": 1, "S": 1, "C": 129, "P": 129},
    "a prompt of 512 tokens": {"T": 512, "R": 1, "S": 1, "C": 512 * 513 // 2, "P": 512},
}
"""Steps whose work is shown; see `ir.ops.Sizes`."""


@dataclass(frozen=True, kw_only=True)
class Life:
    """One value on its way from the model file to the processor."""

    subject: Subject
    value: NamedValue
    passes: tuple[NamedPass, ...]
    row: Row
    activations: str
    style: Style

    def parts(self, *, is_full: bool) -> Iterator[str]:
        """The whole text, heading after heading."""
        name = self.value.node.result.name
        stages, graph = trace_value(self.subject.graph, self.passes, self.value.function, name)
        yield from self.title()
        yield from self.model_part()
        yield from self.built_part(stages[0])
        yield from self.passes_part(stages)
        yield from self.work(graph)
        listings = self.listings(graph)
        yield from self.code_part("4. LLVM IR", [(x, x.ir) for x in listings], is_full)
        yield from self.code_part(
            f"5. Assembly for {self.row.name}", [(x, x.assembly) for x in listings], is_full
        )

    def title(self) -> Iterator[str]:
        node = self.value.node
        what = f"`{self.value.name}`, a `{node.op}`" if self.value.name != node.op else node.op
        yield self.style.bold(f"The life of {what} in {self.subject.config.name}")
        yield f"{self.activations} activations, instruction set {self.row.name}"
        for note in filter(None, (self.subject.note, self.value.note)):
            yield f"({note})"
        others = [v.name for v in named_values(self.subject.graph) if v.node.op == node.op]
        others = [name for name in dict.fromkeys(others) if name != self.value.name]
        if others:
            yield wrapped(f"The model's other {node.op} operations: {', '.join(others)}.", 0)
        yield ""

    def model_part(self) -> Iterator[str]:
        yield self.style.heading("1. In the model")
        chain = self.subject.origins[self.value.function, self.value.node.result.name]
        for depth, line in enumerate(chain):
            where = f"{_short(line.path)}:{line.number}"
            yield f"{'  ' * depth}{line.function}  {self.style.faint(where)}"
            text = linecache.getline(str(line.path), line.number).strip()
            yield f"{'  ' * depth}    {text}"
        yield ""
        yield from self.source(chain[-1])
        yield ""
        yield from self.reference()

    def source(self, line: SourceLine) -> Iterator[str]:
        """The function in which the value is made, its line marked."""
        lines = linecache.getlines(str(line.path))
        for offset, text in enumerate(inspect.getblock(lines[line.first - 1 :])):
            number = line.first + offset
            shown = f"{number:>5} {'>' if number == line.number else ' '} {text.rstrip()}"
            yield self.style.green(shown) if number == line.number else shown

    def reference(self) -> Iterator[str]:
        """What the operation computes."""
        computes = OPS[self.value.node.op].reference
        path = Path(inspect.getfile(computes))
        number = inspect.getsourcelines(computes)[1]
        text = (inspect.getdoc(computes) or "").split("\n\n")[0].replace("\n", " ")
        yield f"What it computes, in NumPy: {computes.__name__}, {_short(path)}:{number}"
        if text:
            yield wrapped(text, 4)
        yield ""

    def built_part(self, built: Stage) -> Iterator[str]:
        yield self.style.heading("2. As built: the IR")
        yield from self.stage(built, built)

    def passes_part(self, stages: list[Stage]) -> Iterator[str]:
        yield self.style.heading("3. Through the passes")
        for before, stage in pairwise(stages):
            yield f"pass {stage.number}, {self.style.bold(stage.name)}"
            yield wrapped(stage.summary, 2)
            yield from self.stage(stage, before)
        yield "The other passes change nothing here."
        yield ""

    def work(self, graph: Graph) -> Iterator[str]:
        """What the phase that makes the value has to do, for the roofline."""
        function = graph.function(self.value.function)
        found = node_of(function, self.value.node.result.name)
        if found is None:
            return
        cache = "f32" if self.activations == "f32" else "bf16"
        yield "What its phase does at the least, each time it runs:"
        for step, sizes in _STEPS.items():
            work = phase_work(found[1], function.values, sizes, cache=cache)
            size = f"{work.flops / 1e6:,.3f} MFLOP, {work.size_bytes / 1e6:,.3f} MB"
            ratio = f", {work.intensity:.1f} FLOP a byte" if work.size_bytes else ""
            yield f"  {step}: {size}{ratio}"
        yield ""

    def stage(self, stage: Stage, before: Stage) -> Iterator[str]:
        """The nodes after a pass; lines that are new are marked with a plus."""
        if not stage.lines:
            yield indented("(gone: nobody uses it, or an equal node makes it)")
        for line in stage.lines:
            is_new = line not in before.lines
            yield self.style.green(f"  + {line}") if is_new else f"    {line}"
        where = f"where {', '.join(stage.operands)}"
        is_new = stage.operands != before.operands
        yield self.style.green(f"  + {where}") if is_new else self.style.faint(f"    {where}")
        yield ""

    def listings(self, graph: Graph) -> list[Listing]:
        function = graph.function(self.value.function)
        name = self.value.node.result.name
        found = node_of(function, name)
        if found is None:
            return []
        config = EngineConfig()
        options = Options(
            row=self.row,
            activations=self.activations,
            max_tokens=config.max_num_batched_tokens,
            max_rows=config.max_num_seqs,
        )
        return explain_phase(graph, function, found[1], name, options)

    def code_part(
        self, heading: str, listings: list[tuple[Listing, str]], is_full: bool
    ) -> Iterator[str]:
        yield self.style.heading(heading)
        for listing, code in listings:
            yield self.style.bold(listing.symbol)
            yield wrapped(listing.role, 2)
            yield ""
            yield indented(code if is_full else heart_of(code), 2)
            yield ""


def _short(path: Path) -> str:
    """A file of ours from the package's name on."""
    parts = path.parts
    return "/".join(parts[len(parts) - parts[::-1].index("tokenmill") - 1 :])

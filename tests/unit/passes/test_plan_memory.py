"""plan_memory: no value is overwritten while a thread may still need it."""

from collections.abc import Iterator

from hypothesis import HealthCheck, given, settings

from tests.backend.graphs import Case, cases
from tests.unit.passes.pass_text import graph_of
from tokenmill.ir.graph import Function, Node, Type
from tokenmill.passes.pipeline import SPMD_PASSES, run_passes
from tokenmill.passes.place_barriers import place_barriers, split_of
from tokenmill.passes.plan_memory import ALIGN, MemoryPlan, plan_memory

ROWS = {"T": 7, "R": 3}


def size_bytes(kind: Type) -> int:
    return ROWS[str(kind.shape[0])] * int(kind.shape[1]) * 4


def sizes_of(function: Function) -> dict[str, int]:
    """Bytes of every value that others than its own node see; handles have no place."""
    made = [v for n in function.nodes for v in n.results] + list(function.params)
    return {v.name: size_bytes(v.type) for v in made if v.type.dtype in ("f32", "bf16", "int8")}


def takes_over(node: Node) -> Iterator[tuple[str, str]]:
    """A sum may be written where a term of its size lies, and layers where their input lies."""
    if node.op == "repeat":
        yield node.result.name, node.operands[0]
    for leaf in node.leaves:
        if leaf.op == "add":
            yield from ((leaf.result.name, operand) for operand in leaf.operands)


def plan(function: Function) -> MemoryPlan:
    sizes = sizes_of(function)
    fixed = {p.name: 0 for p in function.params if p.name in sizes}
    return plan_memory(
        function,
        sizes,
        start=max((sizes[name] for name in fixed), default=0) // ALIGN * ALIGN + ALIGN,
        fixed=fixed,
        takes_over=takes_over,
    )


def check_contents(function: Function, planned: MemoryPlan) -> None:
    """Run node after node: what a node reads must still lie where it was put."""
    sizes = sizes_of(function)
    places = {n: range(at, at + sizes[n]) for n, at in planned.offsets.items()}
    whole = [n for n in places if n in {p.name for p in function.params}]
    for node in function.nodes:
        assert all(name in whole for name in node.operands if name in places), node
        made = [v.name for v in node.results if v.name in places]
        for name in made:
            whole = [n for n in whole if not overlap(places[n], places[name])]
            whole.append(name)
    assert all(name in whole for name in function.returns if name in places)


def check_races(function: Function, planned: MemoryPlan) -> None:
    """Between two barriers threads run ahead of each other: what one writes no other touches."""
    sizes = sizes_of(function)
    places = {n: range(at, at + sizes[n]) for n, at in planned.offsets.items()}
    phase: list[Node] = []
    for node in function.nodes:
        if node.op == "barrier":
            phase = []
            continue
        for earlier in phase:
            for one, other in ((earlier, node), (node, earlier)):
                written = [places[v.name] for v in one.results if v.name in places]
                names = (*other.operands, *(v.name for v in other.results))
                for touched in (places[n] for n in names if n in places):
                    clash = [w for w in written if overlap(w, touched)]
                    assert all(w == touched for w in clash), (earlier, node)
                    assert not clash or split_of(one) == split_of(other), (earlier, node)
        phase = [] if node.op == "repeat" else [*phase, node]  # layers end with a barrier


def overlap(a: range, b: range) -> bool:
    return a.start < b.stop and b.start < a.stop


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(cases())
def test_values_of_random_graphs_stay_whole(case: Case) -> None:
    graph = run_passes(case.numeric, SPMD_PASSES)
    for function in graph.functions:
        planned = plan(function)
        assert all(at % ALIGN == 0 for at in planned.offsets.values())
        check_contents(function, planned)
        check_races(function, planned)


def planned(lines: str) -> MemoryPlan:
    return plan(place_barriers(graph_of(lines)).main)


def test_a_place_is_used_again_behind_a_barrier() -> None:
    offsets = planned(
        """
        %a = linear(%h, @k) : f32[T,64]
        %b = linear(%h, @v) : f32[T,64]
        %c = mul(%a, %b) : f32[T,64]
        %d = round(%c) {to='bf16'} : bf16[T,64]
        %e = linear(%d, @k) : f32[T,64]
        return %e
        """
    ).offsets
    assert len({offsets[name] for name in ("%a", "%b", "%c", "%d")}) == 4
    assert offsets["%e"] in (offsets["%a"], offsets["%b"])


def test_a_sum_takes_over_the_place_of_a_term_that_dies() -> None:
    offsets = planned(
        """
        %a = linear(%h, @k) : f32[T,64]
        %b = add(%x, %a) : f32[T,64]
        return %b
        """
    ).offsets
    assert offsets["%b"] == offsets["%a"]


def test_a_term_that_is_read_again_keeps_its_place() -> None:
    offsets = planned(
        """
        %a = linear(%h, @k) : f32[T,64]
        %b = add(%a, %a) : f32[T,64]
        %c = mul(%a, %b) : f32[T,64]
        return %c
        """
    ).offsets
    assert offsets["%b"] != offsets["%a"]


def test_a_term_that_another_thread_may_still_read_keeps_its_place() -> None:
    """The two readers of %a split their work in different ways, with no barrier between."""
    lines = """
        %a = linear(%h, @k) : f32[T,64]
        %r = select_rows(%a, %rows) : f32[R,64]
        %b = add(%x, %a) : f32[T,64]
        return %b, %r
        """
    offsets = planned(lines).offsets
    assert offsets["%b"] != offsets["%a"]

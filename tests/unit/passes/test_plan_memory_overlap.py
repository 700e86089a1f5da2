"""No value is overwritten while some thread may still read it."""

from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.ir.graph import Function, Graph, Node, Type, Value
from tokenmill.passes.place_barriers import place_barriers, split_of
from tokenmill.passes.plan_memory import MemoryPlan, plan_memory

X = Type("f32", ("T", 32))
PARAM = Value("%x", X)


def node(op: str, name: str, *operands: str) -> Node:
    return Node(op, tuple(f"%{o}" for o in operands), (Value(f"%{name}", X),))


def function(*nodes: Node, returns: tuple[str, ...] = ()) -> Function:
    """A body of these nodes, with barriers where they belong."""
    names = tuple(f"%{name}" for name in returns) or (nodes[-1].result.name,)
    made = Function("layer", (PARAM,), (), nodes, names)
    return place_barriers(Graph("g", (made,))).main


@st.composite
def functions(draw: st.DrawFn) -> Function:
    """Nodes that split their work in two ways, each reading a few values made before."""
    names, nodes = ["x"], []
    for index in range(draw(st.integers(1, 14))):
        op = draw(st.sampled_from(("add", "add", "linear")))
        operands = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3))
        nodes.append(node(op, f"v{index}", *operands))
        names.append(f"v{index}")
    returns = draw(st.lists(st.sampled_from(names[1:]), min_size=1, max_size=2, unique=True))
    return function(*nodes, returns=tuple(returns))


def takes_over(node: Node) -> Iterator[tuple[str, str]]:
    for value in node.results:
        yield value.name, node.operands[0]


def overlapping(plan: MemoryPlan, sizes: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Pairs of values that share a byte, the lower name in the plan first."""
    names = list(plan.offsets)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            start = max(plan.offsets[a], plan.offsets[b])
            if start < min(plan.offsets[n] + sizes[n] for n in (a, b)):
                yield a, b


class Lives:
    """When each value is made and read: the index of nodes, and between which barriers."""

    def __init__(self, function: Function) -> None:
        self.nodes = function.nodes
        self.epochs = []
        for item in function.nodes:
            previous = self.epochs[-1] if self.epochs else 0
            self.epochs.append(previous + (item.op == "barrier"))
        self.makers = {v.name: i for i, n in enumerate(self.nodes) for v in n.results}
        self.readers: dict[str, list[int]] = {}
        for index, item in enumerate(self.nodes):
            for name in item.operands:
                self.readers.setdefault(name, []).append(index)
        self.returns = function.returns

    def epochs_of(self, name: str) -> set[int]:
        """Every stretch between barriers in which the value must be whole."""
        uses = [self.makers.get(name, 0), *self.readers.get(name, [])]
        last = self.epochs[-1] + 1 if name in self.returns else self.epochs[max(uses)]
        return set(range(self.epochs[min(uses)], last + 1))

    def may_take_over(self, result: str, operand: str) -> bool:
        """Whether a node may write its result over its operand, element by element."""
        index = self.makers[result]
        readers = self.readers.get(operand, [])
        near = [i for i in readers if self.epochs[i] == self.epochs[index]]
        return (
            self.nodes[index].operands[:1] == (operand,)
            and operand not in self.returns
            and max(readers) == index
            and len({split_of(self.nodes[i]) for i in near}) == 1
        )

    def heirs(self, name: str, plan: MemoryPlan) -> set[str]:
        """Values that may lie in a value's place, one taking it over from the other."""
        found = {
            other
            for other in self.makers
            if plan.offsets[other] == plan.offsets[name] and self.may_take_over(other, name)
        }
        return found | {h for other in found for h in self.heirs(other, plan)}


@settings(max_examples=300, deadline=None)
@given(function=functions(), data=st.data())
def test_no_two_live_values_overlap(function: Function, data: st.DataObject) -> None:
    names = sorted({v.name for n in function.nodes for v in n.results})
    sizes = {n: data.draw(st.integers(1, 5)) * 64 - 60 for n in names}
    start = data.draw(st.sampled_from((0, 128)))
    plan = plan_memory(function, sizes, start=start, takes_over=takes_over)
    lives = Lives(function)
    for a, b in overlapping(plan, sizes):
        is_apart = not lives.epochs_of(a) & lives.epochs_of(b)
        assert is_apart or b in lives.heirs(a, plan) or a in lives.heirs(b, plan), (a, b)
    assert all(plan.offsets[n] >= start and plan.offsets[n] % 64 == 0 for n in names)
    assert all(plan.offsets[n] + sizes[n] <= plan.size_bytes for n in names)


def test_a_place_is_handed_on_only_behind_a_barrier() -> None:
    """`b` is read by the last linear before the barrier; only `d`, behind it, may lie there."""
    f = function(
        node("linear", "a", "x"), node("linear", "b", "a"), node("linear", "c", "b"),
        node("linear", "d", "c"),
    )  # fmt: skip
    sizes = dict.fromkeys(("%a", "%b", "%c", "%d"), 64)
    plan = plan_memory(f, sizes)
    assert len({plan.offsets[n] for n in ("%a", "%b")}) == 2
    assert plan.offsets["%c"] != plan.offsets["%b"]
    assert plan.size_bytes == 128


def test_a_sum_takes_the_place_of_its_last_operand() -> None:
    f = function(node("linear", "a", "x"), node("add", "b", "a"), node("add", "c", "b"))
    plan = plan_memory(f, dict.fromkeys(("%a", "%b", "%c"), 64), takes_over=takes_over)
    assert plan.size_bytes == 64


def test_nothing_is_taken_over_that_is_read_later() -> None:
    f = function(node("linear", "a", "x"), node("add", "b", "a"), node("add", "c", "a", "b"))
    plan = plan_memory(f, dict.fromkeys(("%a", "%b", "%c"), 64), takes_over=takes_over)
    assert plan.offsets["%b"] != plan.offsets["%a"]
    assert plan.offsets["%c"] == plan.offsets["%a"]


def test_nothing_is_taken_over_that_another_split_still_reads() -> None:
    """Two linears read `a` between the same barriers: the second must not write over it."""
    f = function(node("add", "a", "x"), node("linear", "b", "a"), node("linear", "c", "a"))
    plan = plan_memory(f, dict.fromkeys(("%a", "%b", "%c"), 64), takes_over=takes_over)
    assert plan.offsets["%c"] != plan.offsets["%a"]


def test_a_result_may_take_over_a_place_outside_the_arena() -> None:
    f = function(node("add", "a", "x"))
    plan = plan_memory(f, {"%x": 64, "%a": 64}, start=128, fixed={"%x": 0}, takes_over=takes_over)
    assert plan.offsets["%a"] == 0
    assert plan.size_bytes == 128


def test_a_returned_value_is_never_overwritten() -> None:
    f = function(
        node("linear", "a", "x"), node("linear", "b", "a"), node("linear", "c", "b"),
        returns=("a", "c"),
    )  # fmt: skip
    plan = plan_memory(f, dict.fromkeys(("%a", "%b", "%c"), 64), takes_over=takes_over)
    assert plan.offsets["%a"] not in (plan.offsets["%b"], plan.offsets["%c"])

"""The passes by name, in order. A pass is a function, graph in and graph out."""

from collections.abc import Callable, Mapping
from functools import partial

from tokenmill.ir.graph import Graph
from tokenmill.passes.choose_formats import choose_formats
from tokenmill.passes.clean_up import clean_up
from tokenmill.passes.fuse_attention import fuse_attention
from tokenmill.passes.fuse_gates import fuse_gates
from tokenmill.passes.fuse_norms import fuse_norms
from tokenmill.passes.fuse_qkv import fuse_qkv
from tokenmill.passes.fuse_residuals import fuse_residuals
from tokenmill.passes.place_barriers import place_barriers
from tokenmill.passes.round_activations import round_activations

Pass = Callable[[Graph], Graph]
NamedPass = tuple[str, Pass]


def numeric_passes(
    *, formats: Mapping[str, str], activations: str, cache: str
) -> tuple[NamedPass, ...]:
    """What decides the numbers: every backend runs these."""
    return (
        ("choose_formats", partial(choose_formats, formats=formats)),
        (
            "round_activations",
            partial(round_activations, activations=activations, cache=cache),
        ),
        ("clean_up", clean_up),
    )


SPMD_PASSES: tuple[NamedPass, ...] = (
    ("fuse_norms", fuse_norms),
    ("fuse_qkv", fuse_qkv),
    ("fuse_gates", fuse_gates),
    ("fuse_residuals", fuse_residuals),
    ("fuse_attention", fuse_attention),
    ("place_barriers", place_barriers),
)
"""What a backend adds that runs a step as phases shared by threads."""


def run_passes(
    graph: Graph,
    passes: tuple[NamedPass, ...],
    after: Callable[[str, Graph], None] = lambda name, graph: None,
) -> Graph:
    """Run passes in order; `after` sees each one's name and result (to verify, or to print)."""
    for name, run in passes:
        graph = run(graph)
        after(name, graph)
    return graph

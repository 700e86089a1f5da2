"""What `tokenmill explain` speaks of: a model without its weights, and one of its values."""

from dataclasses import dataclass, replace

from tokenmill.errors import ModelNotFoundError, UsageError
from tokenmill.ir.graph import Graph, Node
from tokenmill.ir.ops import OPS
from tokenmill.models.checkpoint import open_checkpoint
from tokenmill.models.config import Encoder, Experts, LayerKind, ModelConfig, Rope
from tokenmill.models.provenance import Origins, trace_build
from tokenmill.models.sources import LocalSource, fetch, parse_source
from tokenmill.models.weights import target_formats
from tokenmill.passes.history import Made, first_made
from tokenmill.passes.pipeline import NamedPass

_EXAMPLE = ModelConfig(
    architecture="llama",
    name="a Llama of SmolLM2's size",
    vocab_size=49152,
    hidden_size=576,
    layers=(LayerKind(rope=Rope(theta=100_000.0)),) * 30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    norm_eps=1e-5,
    rotary_dim=64,
    context_length=8192,
    is_tied=True,
    has_attention_bias=False,
)
"""What is explained while the model itself is not on disk."""

_OTHERS = (
    replace(
        _EXAMPLE,
        architecture="gemma2",
        name="a small Gemma 2",
        embedding_scale=24.0,
        logits_softcap=30.0,
    ),
    replace(
        _EXAMPLE,
        architecture="qwen3moe",
        name="a small Qwen3-MoE",
        experts=Experts(count=16, per_token=2, size=192, is_renormalized=True),
    ),
    replace(
        _EXAMPLE,
        architecture="bert",
        name="a small BERT",
        layers=(LayerKind(rope=None),) * 6,
        num_kv_heads=9,
        encoder=Encoder(num_positions=512, first_position=0, num_segments=2),
    ),
)
"""Between them they have the operations that a Llama lacks."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model without its weights."""

    config: ModelConfig
    graph: Graph
    origins: Origins
    formats: dict[str, str]
    note: str


@dataclass(frozen=True, kw_only=True)
class NamedValue:
    """A value of the graph as built, in one of its functions.

    `note` says why it is shown where something else was asked for.
    """

    function: str
    node: Node
    note: str = ""

    @property
    def name(self) -> str:
        return self.node.result.name[1:]


def load_subject(model: str) -> Subject:
    """The model if it is on disk, else an example; nothing is fetched."""
    source = parse_source(model)
    try:
        local = fetch(source, offline=True)
    except ModelNotFoundError:
        if isinstance(source, LocalSource):
            raise
        note = f"{model} is not on disk (`tokenmill pull {model}` fetches it): an example instead"
        return _example(_EXAMPLE, note)
    checkpoint = open_checkpoint(local.path)
    graph, origins = trace_build(checkpoint.config)
    shapes = {n: tuple(int(d) for d in t.shape) for n, t in graph.weights().items()}
    formats = target_formats(checkpoint, shapes, "auto")
    return Subject(config=checkpoint.config, graph=graph, origins=origins, formats=formats, note="")


def _example(config: ModelConfig, note: str) -> Subject:
    graph, origins = trace_build(config)
    formats = {n: "q4" for n, kind in graph.weights().items() if kind.dtype == "w"}
    return Subject(config=config, graph=graph, origins=origins, formats=formats, note=note)


def subject_with(subject: Subject, op: str) -> Subject:
    """The same, or an example that has an operation which the model lacks."""
    if op not in OPS or any(op in (v.name, v.node.op) for v in named_values(subject.graph)):
        return subject
    for config in _OTHERS:
        example = _example(config, f"{subject.config.name} has no {op}: an example instead")
        if any(v.node.op == op for v in named_values(example.graph)):
            return example
    return subject  # a pass may make it


def named_values(graph: Graph) -> list[NamedValue]:
    """Every value that an operation makes: a layer's before main's."""
    functions = (*graph.functions[1:], graph.main)
    return [
        NamedValue(function=f.name, node=node)
        for f in functions
        for node in f.nodes
        if node.op in OPS
    ]


def find_value(subject: Subject, name: str, passes: tuple[NamedPass, ...]) -> NamedValue:
    """By `function.value`, by value, or the first of an operation.

    For an operation that `passes` make it is the value that the first of these reads.
    """
    values = named_values(subject.graph)
    for spelling in (
        [v for v in values if f"{v.function}.{v.name}" == name],
        [v for v in values if v.name == name],
        [v for v in values if v.node.op == name],
    ):
        if spelling:
            return spelling[0]
    if name in OPS and (made := first_made(subject.graph, passes, name)):
        return _source_of(made, values)
    known = ", ".join(dict.fromkeys([*(v.node.op for v in values), *(v.name for v in values)]))
    raise UsageError(f"{subject.config.name} has no operation {name!r}: choose one of {known}")


def _source_of(made: Made, values: list[NamedValue]) -> NamedValue:
    """The value as built that a node made by a pass stands for now, or that it reads first."""
    names = (made.node.result.name, made.node.operands[0])
    built = {(v.function, v.node.result.name): v for v in values}
    source = next(found for n in names if (found := built.get((made.function, n))))
    note = f"{made.node.op} is made by the pass {made.by}, here of `{source.name}`, which is shown"
    return replace(source, note=note)

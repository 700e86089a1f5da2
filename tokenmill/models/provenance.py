"""Which lines of the model files made each value of a graph."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tokenmill.ir.build import FunctionBuilder
from tokenmill.ir.graph import Graph, Value
from tokenmill.models.config import ModelConfig
from tokenmill.models.registry import build_graph

_FOLDER = Path(__file__).parent / "architectures"


@dataclass(frozen=True, kw_only=True)
class SourceLine:
    """A line of a model file that was running when a value was made."""

    path: Path
    number: int
    function: str
    first: int  # line at which the function starts


Origins = dict[tuple[str, str], tuple[SourceLine, ...]]
"""By function of the graph and value: the chain of calls, the outermost first."""


def trace_build(config: ModelConfig) -> tuple[Graph, Origins]:
    """Build a model's graph, and watch who emits what."""
    origins: Origins = {}

    def watch(frame: FrameType, event: str, result: object) -> None:
        is_made = event == "return" and frame.f_code is FunctionBuilder.node.__code__
        if is_made and isinstance(result, Value):
            key = (frame.f_locals["self"].name, result.name)
            origins[key] = tuple(reversed(list(_model_lines(frame))))

    previous = sys.getprofile()
    sys.setprofile(watch)
    try:
        graph = build_graph(config)
    finally:
        sys.setprofile(previous)
    return graph, origins


def _model_lines(frame: FrameType) -> Iterator[SourceLine]:
    """The lines of architecture files on the stack, the innermost first."""
    caller: FrameType | None = frame
    while caller is not None:
        code = caller.f_code
        path = Path(code.co_filename)
        is_model = path.parent == _FOLDER
        if is_model and code.co_name != "<lambda>":
            yield SourceLine(
                path=path,
                number=caller.f_lineno,
                function=code.co_name,
                first=code.co_firstlineno,
            )
        caller = caller.f_back

"""The architectures by name. Adding one is adding a file and a line here."""

from collections.abc import Callable

from tokenmill.errors import UnsupportedModelError
from tokenmill.ir.graph import Graph
from tokenmill.models import llama, qwen2
from tokenmill.models.config import ModelConfig

BUILDERS: dict[str, Callable[[ModelConfig], Graph]] = {
    "llama": llama.build,
    "qwen2": qwen2.build,
}


def build_graph(config: ModelConfig) -> Graph:
    """The graph of a model. Raises UnsupportedModelError for an unknown architecture."""
    builder = BUILDERS.get(config.architecture)
    if builder is None:
        known = ", ".join(BUILDERS)
        raise UnsupportedModelError(
            f"architecture {config.architecture!r} is not supported; supported are {known}"
        )
    return builder(config)

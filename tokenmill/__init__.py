"""tokenmill: serve large language models end to end."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenmill.engine.adapters import LoRARequest
    from tokenmill.engine.llm import LLM
    from tokenmill.sampling.params import SamplingParams
    from tokenmill.sampling.pooling import PoolingParams

__version__ = "0.1.0"
__all__ = ["LLM", "LoRARequest", "PoolingParams", "SamplingParams", "__version__"]

_EXPORTS = {
    "LLM": "tokenmill.engine.llm",
    "LoRARequest": "tokenmill.engine.adapters",
    "PoolingParams": "tokenmill.sampling.pooling",
    "SamplingParams": "tokenmill.sampling.params",
}


def __getattr__(name: str) -> object:
    """Import an export when it is first asked for: `import tokenmill` itself costs nothing."""
    from importlib import import_module

    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})

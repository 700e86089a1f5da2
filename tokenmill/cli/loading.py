"""Bring up the engine for a command, and check what the user gave it to read."""

from typing import TYPE_CHECKING

from tokenmill.cli.progress import make_progress
from tokenmill.config import EngineConfig
from tokenmill.errors import UsageError

if TYPE_CHECKING:
    from tokenmill.engine.llm import LLM


def open_llm(config: EngineConfig) -> "LLM":
    """Load a model, with progress on standard error; the caller closes it."""
    from tokenmill.engine.llm import LLM

    return LLM.from_config(config, progress=make_progress())


def check_text(text: str, what: str) -> str:
    """The text itself; UsageError where it is empty or holds bytes that were no UTF-8."""
    if not text.strip():
        raise UsageError(f"{what} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} is not UTF-8 at character {error.start}") from error
    return text

"""How a command ends: what is said, and with which exit code."""

import os
import sys
from collections.abc import Callable

from tokenmill.errors import TokenmillError

INTERRUPTED = 130
"""128 and the number of SIGINT, as shells report it."""
BROKEN_PIPE = 141
"""128 and the number of SIGPIPE."""


def run_guarded(command: Callable[[], None], *, is_debug: bool) -> int:
    """Run a command; every exception becomes one line and the exit code that is returned."""
    try:
        command()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if is_debug:
            import traceback

            traceback.print_exc()
        return _report(error)
    return 0


def print_error(message: str) -> None:
    """One line on standard error, with nothing in it that could steer the terminal."""
    line = " ".join(message.split())
    safe = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)
    print(f"error: {safe}", file=sys.stderr)


def _report(error: BaseException) -> int:
    """Say what happened; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print(file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # Python flushes standard output once more at exit, and would complain about the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    if isinstance(error, TokenmillError):
        print_error(str(error))
        return error.exit_code
    kind = type(error).__name__
    print_error(f"internal error: {kind}: {error} (run with --debug for the traceback)")
    return 1

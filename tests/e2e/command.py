"""The command line as a user starts it: a process of its own."""

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import tokenmill

PROGRAM = (sys.executable, "-m", "tokenmill.cli")
QUESTION = "What is the capital of Japan?"
ANSWER = "The capital of Japan is Tokyo."

_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE = 24, 1  # linux/prctl.h, linux/capability.h


def environment(home: Path, **settings: str) -> dict[str, str]:
    """The environment of a command that keeps its files in `home`."""
    rest = {k: v for k, v in os.environ.items() if not k.startswith(("TOKENMILL_", "HF_"))}
    package = str(Path(tokenmill.__file__).parents[1])
    return {**rest, "PYTHONPATH": package, "TOKENMILL_HOME": str(home), **settings}


def run_command(
    *arguments: str,
    home: Path,
    settings: Mapping[str, str] | None = None,
    max_file_bytes: int | None = None,
    obeys_modes: bool = False,
    stdin: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run `tokenmill` to its end; `max_file_bytes` stands for a disk that is full.

    With `obeys_modes`, a folder that its mode makes read-only is so for root too.
    """

    def limit() -> None:
        if max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        if obeys_modes and os.geteuid() == 0:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.prctl(_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "cannot give up CAP_DAC_OVERRIDE")

    return subprocess.run(
        [*PROGRAM, *arguments],
        env=environment(home, **(settings or {})),
        capture_output=True,
        text=True,
        input=stdin,
        timeout=300,
        preexec_fn=limit,
    )


def ask(model: Path, home: Path, *flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """`tokenmill run` with the one question whose answer the tests know."""
    return run_command(*ask_words(model), *flags, home=home, settings=settings)


def ask_words(model: Path) -> tuple[str, ...]:
    """The command line of `ask`."""
    return ("run", QUESTION, "--model", str(model), "--temperature", "0")


def assert_answered(done: subprocess.CompletedProcess[str]) -> None:
    """It ended well, and standard output is the answer and nothing else."""
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{ANSWER}\n"
    assert "Traceback" not in done.stderr


def assert_refused(done: subprocess.CompletedProcess[str], exit_code: int, *fragments: str) -> None:
    """It said in one line what was wrong, and printed no text."""
    assert done.returncode == exit_code, done.stderr
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    for fragment in fragments:
        assert fragment in line

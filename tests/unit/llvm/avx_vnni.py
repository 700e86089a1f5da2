"""Lets a processor without AVX-VNNI run that row's code: avx_vnni.c does the dots that trap."""

import ctypes
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from tokenmill.backends.llvm.target import host_features

ROW = "avx2-vnni"
_SOURCE = Path(__file__).with_suffix(".c")
_CC = shutil.which("cc")


def _why_not() -> str:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "needs Linux on x86-64"
    if not host_features().get("avx2"):
        return "needs AVX2"
    return "" if _CC else "needs a C compiler, cc"


WHY_NO_TRAP = _why_not()
"""Why `install` cannot be called here; empty if it can."""


@cache
def install() -> ctypes.CDLL:
    """Compile the handler and make it this process's own for illegal instructions."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "avx_vnni.so"
        command = [str(_CC), "-O2", "-shared", "-fPIC", "-o", str(library), str(_SOURCE)]
        subprocess.run(command, check=True)
        loaded = ctypes.CDLL(str(library))
    if loaded.install():
        raise OSError("the system refuses a handler of SIGILL")
    return loaded


def num_handled() -> int:
    """Instructions that the handler has done."""
    loaded = install()
    loaded.handled.restype = ctypes.c_uint64
    return int(loaded.handled())

"""Runs AArch64 code on another processor: linked to a driver in C, under qemu's user emulation."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

QEMU, CC = "qemu-aarch64", "aarch64-linux-gnu-gcc"
_MISSING = [tool for tool in (QEMU, CC) if shutil.which(tool) is None]
WHY_NO_EMULATOR = f"needs {' and '.join(_MISSING)}" if _MISSING else ""

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

_DRIVER = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef void (*kernel)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
%(declarations)s
static const struct { const char *name; kernel call; } table[] = { %(entries)s };
int main(int argc, char **argv) {
    int64_t heads[8][2], words[8] = {0};  /* size in bytes and value; size -1: an integer */
    FILE *file = fopen(argv[2], "r+b");
    if (argc != 3 || !file || fread(heads, sizeof heads, 1, file) != 1) return 2;
    for (int i = 0; i < 8; i++) {
        words[i] = heads[i][1];
        if (heads[i][0] < 0) continue;
        void *bytes = aligned_alloc(64, (heads[i][0] + 63) / 64 * 64 + 64);
        if (fread(bytes, 1, heads[i][0], file) != (size_t)heads[i][0]) return 3;
        words[i] = (int64_t)(intptr_t)bytes;
    }
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (!strcmp(table[i].name, argv[1]))
            table[i].call(words[0], words[1], words[2], words[3],
                          words[4], words[5], words[6], words[7]);
    fseek(file, sizeof heads, SEEK_SET);
    for (int i = 0; i < 8; i++)
        if (heads[i][0] >= 0) fwrite((void *)(intptr_t)words[i], 1, heads[i][0], file);
    return fclose(file) ? 4 : 0;
}
"""


class EmulatedObject:
    """Object code as a program of its own; each call is a process."""

    def __init__(self, code: bytes, symbols: list[str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._program, self._data = folder / "program", folder / "data"
        declarations = "\n".join(f"void {s}();" for s in symbols)
        entries = ", ".join(f'{{"{s}", (kernel){s}}}' for s in symbols)
        (folder / "driver.c").write_text(
            _DRIVER % {"declarations": declarations, "entries": entries}
        )
        (folder / "code.o").write_bytes(code)
        command = [CC, "-O1", "-w", "-static", "-o", "program", "driver.c", "code.o"]
        subprocess.run(command, cwd=folder, check=True)

    def call(self, symbol: str, *arguments: int | Array) -> None:
        """Call a function of up to eight integers and arrays, which it may change."""
        heads = np.full((8, 2), (-1, 0), np.int64)
        for head, argument in zip(heads, arguments, strict=False):
            head[:] = (-1, argument) if isinstance(argument, int) else (argument.nbytes, 0)
        arrays = [a for a in arguments if not isinstance(a, int)]
        self._data.write_bytes(heads.tobytes() + b"".join(a.tobytes() for a in arrays))
        subprocess.run([QEMU, str(self._program), symbol, str(self._data)], check=True)
        left = self._data.read_bytes()[heads.nbytes :]
        for array in arrays:
            array[...] = np.frombuffer(left[: array.nbytes], array.dtype).reshape(array.shape)
            left = left[array.nbytes :]

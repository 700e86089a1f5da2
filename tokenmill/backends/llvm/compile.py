"""LLVM IR text to machine code, and machine code into this process.

Compiling and loading are apart, so that a second start loads the object and compiles nothing.
"""

import ctypes
import re
from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any

import llvmlite.binding as llvm
from llvmlite.binding import ffi

from tokenmill.backends.llvm.target import Row, initialize, make_target_machine

SHORT_PIPELINE = (
    "always_inliner",
    "sroa",
    "simplify_cfg",
    "instruction_combine",
    "new_gvn",
    "loop_rotate",
    "simplify_cfg",
    "dead_code_elimination",
    "global_dead_code_eliminate",
)
"""Enough for kernels that are written as tiles: the code is as fast as after LLVM's own -O2
pipeline, which takes four times as long."""


class InvalidIrError(Exception):
    """LLVM refused IR that we emitted: a bug of ours. Carries the offending line."""


def compile_object(ir_text: str, row: Row, *, opt_level: int = 1) -> bytes:
    """Object code for a module. `opt_level` 1 runs SHORT_PIPELINE, 2 LLVM's -O2.

    Safe to call from several threads, which then compile at the same time.
    Raises InvalidIrError if LLVM refuses the module.
    """
    machine = make_target_machine(row)
    return _emit_object(_optimized(ir_text, machine, opt_level), machine)


def optimized_ir(ir_text: str, row: Row, function: str | None = None, *, opt_level: int = 1) -> str:
    """The module's IR as the code generator receives it, or one function of it."""
    module = _optimized(ir_text, make_target_machine(row), opt_level)
    return str(module if function is None else module.get_function(function))


def assembly(ir_text: str, row: Row, function: str | None = None, *, opt_level: int = 1) -> str:
    """The module's assembly, or one function of it. Raises KeyError for an unknown function."""
    machine = make_target_machine(row)
    text = str(machine.emit_assembly(_optimized(ir_text, machine, opt_level)))
    if function is None:
        return text
    name = re.escape(function)
    found = re.search(rf"^_?{name}:.*?(?=^\.?Lfunc_end)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise KeyError(f"no function {function} in the assembly")
    return found[0]


def _optimized(ir_text: str, machine: llvm.TargetMachine, opt_level: int) -> llvm.ModuleRef:
    module = _parse(ir_text)
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    tuning = llvm.create_pipeline_tuning_options(speed_level=2)
    tuning.loop_vectorization = False
    tuning.slp_vectorization = False
    builder = llvm.create_pass_builder(machine, tuning)
    passes = builder.getModulePassManager() if opt_level > 1 else _short_passes()
    _unlocked("LLVMPY_RunNewModulePassManager")(passes, module, builder)
    return module


def _short_passes() -> llvm.ModulePassManager:
    passes = llvm.create_new_module_pass_manager()
    for name in SHORT_PIPELINE:
        getattr(passes, f"add_{name}_pass")()
    return passes


def _parse(ir_text: str) -> llvm.ModuleRef:
    """Parse into a context of its own: threads that share a context must not compile at once."""
    try:
        module = llvm.parse_assembly(ir_text, context=llvm.create_context())
        module.verify()
    except RuntimeError as error:
        raise InvalidIrError(_explain(str(error), ir_text)) from error
    return module


def _explain(message: str, ir_text: str) -> str:
    place = re.search(r"<string>:(\d+):", message)
    if place is None:
        return f"LLVM refuses the IR: {message.strip()}"
    number = int(place[1])
    line = [*ir_text.splitlines(), ""][number - 1]
    reason = message[place.end() :].split("error:")[-1].splitlines()[0]
    return f"LLVM refuses line {number} of the IR:{reason}\n  {line.strip()}"


def _emit_object(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> bytes:
    with ffi.OutputString() as error:
        buffer = _unlocked("LLVMPY_TargetMachineEmitToMemory")(machine, module, 1, error)
        if not buffer:
            raise InvalidIrError(f"LLVM cannot generate code: {error}")
    start = ffi.lib.LLVMPY_GetBufferStart(buffer)
    try:
        return ctypes.string_at(start, ffi.lib.LLVMPY_GetBufferSize(buffer))
    finally:
        ffi.lib.LLVMPY_DisposeMemoryBuffer(buffer)


@cache
def _unlocked(name: str) -> Callable[..., Any]:
    """A function of llvmlite's library, called without llvmlite's lock.

    That lock lets one thread into LLVM at a time. The two calls that take nearly all the time
    touch nothing but their own module, context and target machine, so they need no lock.
    """
    locked = getattr(ffi.lib, name)
    bare = getattr(ctypes.CDLL(ffi.lib._name), name)
    bare.argtypes = locked.argtypes
    bare.restype = locked.restype
    return bare  # type: ignore[no-any-return]


class LoadedObject:
    """Object code in this process. Addresses are good for as long as this lives."""

    def __init__(self, jit: llvm.LLJIT, library: str, tracker: llvm.ResourceTracker) -> None:
        self._jit = jit
        self._library = library
        self._trackers = {"": tracker}

    def address(self, symbol: str) -> int:
        """Where a public function lies. Raises KeyError if there is none of that name."""
        if symbol not in self._trackers:
            try:
                self._trackers[symbol] = self._jit.lookup(self._library, symbol)
            except RuntimeError as error:
                raise KeyError(f"no symbol {symbol} in the object, or: {error}") from error
        return int(self._trackers[symbol][symbol])


_library_numbers = count()


def load_object(data: bytes) -> LoadedObject:
    """Link object code into this process; 0.4 ms.

    Symbols that it does not define are sought in the process (libc, libm); one that is not
    there raises KeyError at the first `address`. The bytes must be trusted.
    """
    jit = _linker()
    library = f"object{next(_library_numbers)}"
    builder = llvm.JITLibraryBuilder().add_object_img(data).add_current_process()
    return LoadedObject(jit, library, builder.link(jit, library))


@cache
def _linker() -> llvm.LLJIT:
    initialize()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(reloc="pic", codemodel="small")
    # JITLink places the sections of an object side by side, as near calls and constants need.
    return llvm.create_lljit_compiler(machine, use_jit_link=True, suppress_errors=True)

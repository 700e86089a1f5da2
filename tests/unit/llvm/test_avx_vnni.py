"""The handler that stands in for AVX-VNNI, against NumPy: random instructions of every form."""

import ctypes
import signal
import subprocess
import sys
from dataclasses import dataclass, replace

import llvmlite.binding as llvm
import numpy as np
import pytest

from tests.unit.llvm import avx_vnni
from tests.unit.llvm.avx_vnni import WHY_NO_TRAP
from tests.unit.llvm.native import ROW_NAMES, AnyArray, aligned, apply, row_named
from tokenmill.backends.llvm.compile import compile_object, load_object
from tokenmill.backends.llvm.lanes import I32
from tokenmill.backends.llvm.target import foreign_row, host_features
from tokenmill.ir.order import LANES

pytestmark = [
    pytest.mark.skipif(bool(WHY_NO_TRAP), reason=WHY_NO_TRAP),
    pytest.mark.skipif(avx_vnni.ROW in ROW_NAMES, reason="this processor has AVX-VNNI"),
]

NUM_INSTRUCTIONS = 400
OPCODES = ("vpdpbusd", "vpdpbusds", "vpdpwssd", "vpdpwssds")
GENERAL = ("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", *(f"r{i}" for i in range(8, 16)))
SAVED = ("rbx", "rbp", "r12", "r13", "r14", "r15")
RED_ZONE = "rsp - 64"  # the system leaves 128 bytes below rsp alone
VECTOR_BYTES = 64 if host_features().get("avx512f") else 32


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """`opcode target, first, second`; with an address, `operand` is what lies there."""

    opcode: str
    size: int  # bytes of a register
    target: int
    first: int
    second: int
    operand: bytes
    address: str = ""
    setup: str = ""  # makes the address that of the operand, which rdx holds

    @property
    def text(self) -> str:
        kind, width = ("x", "xmmword") if self.size == 16 else ("y", "ymmword")
        last = f"{width} ptr [{self.address}]" if self.address else f"{kind}mm{self.second}"
        return f"{{vex}} {self.opcode} {kind}mm{self.target}, {kind}mm{self.first}, {last}"


def random_instruction(rng: np.random.Generator) -> Instruction:
    address, setup = random_address(rng) if rng.random() < 0.7 else ("", "")
    target, first, second = map(int, rng.integers(0, 16, 3))
    return Instruction(
        opcode=str(rng.choice(OPCODES)),
        size=int(rng.choice([16, 32])),
        target=target,
        first=first,
        second=second,
        operand=random_bytes(rng, 32).tobytes(),
        address=address,
        setup=setup,
    )


def random_address(rng: np.random.Generator) -> tuple[str, str]:
    """An address of one of the forms that there are, and code that makes it right."""
    base, index = rng.choice(GENERAL, 2, replace=False)
    shift = int(rng.choice([0, 8, -128, 120, 128, 4096, -70000]))
    bits, count = int(rng.integers(0, 4)), int(rng.integers(-1000, 1000))
    match rng.integers(0, 5):
        case 0:
            return "rip + 2f", ""
        case 1:
            return RED_ZONE, ""
        case 2:
            return f"{base} {shift:+}", f"lea {base}, [rdx {-shift:+}]"
        case 3:
            setup = f"lea {index}, [rdx {-shift:+}]\nsar {index}, {bits}"
            return f"{index}*{2**bits} {shift:+}", setup
        case _:
            setup = f"lea {base}, [rdx {-shift - count * 2**bits:+}]\nmov {index}, {count}"
            return f"{base} + {index}*{2**bits} {shift:+}", setup


def random_bytes(rng: np.random.Generator, *shape: int) -> AnyArray:
    """Any bytes, and often the extremes, so that sums saturate."""
    whole = rng.integers(0, 256, shape, np.uint8)
    extremes = rng.choice(np.frombuffer(b"\x00\x7f\x80\xff", np.uint8), shape)
    return np.where(rng.random(shape) < 0.5, extremes, whole)


def function(name: str, instruction: Instruction) -> str:
    """`void name(registers)`: loads all registers, runs the instruction, and stores them all."""
    kind, move = ("zmm", "vmovdqu64") if VECTOR_BYTES == 64 else ("ymm", "vmovdqu")
    places = [(f"{kind}{i}", f"[rdi + {VECTOR_BYTES * i}]") for i in range(16)]
    copy = ("vmovdqu ymm0, [rdx]", f"vmovdqu [{RED_ZONE}], ymm0")
    lines = [
        *(f".globl {name}", f"{name}:", *(f"push {r}" for r in SAVED), "push rdi"),
        *("lea rdx, [rip + 2f]", *(copy if instruction.address == RED_ZONE else ())),
        *(f"{move} {register}, {place}" for register, place in places),
        *(instruction.setup, instruction.text, "pop rdi"),
        *(f"{move} {place}, {register}" for register, place in places),
        *(*(f"pop {r}" for r in reversed(SAVED)), "vzeroupper", "ret", ".balign 64"),
    ]
    return "\n".join([*lines, f"2: .byte {', '.join(map(str, instruction.operand))}"])


def expected(instruction: Instruction, registers: AnyArray) -> AnyArray:
    """All registers after it: [16, VECTOR_BYTES]. What lies above its width becomes zero."""
    size, after = instruction.size, registers.copy()
    operand = np.frombuffer(instruction.operand, np.uint8)
    second = operand if instruction.address else registers[instruction.second]
    kinds = ("u1", "i1") if "bus" in instruction.opcode else ("i2", "i2")
    left, right = (
        values[:size].view(kind).reshape(size // 4, -1).astype(np.int64)
        for values, kind in zip((registers[instruction.first], second), kinds, strict=True)
    )
    sums = registers[instruction.target][:size].view(np.int32) + (left * right).sum(axis=1)
    if instruction.opcode.endswith("ds"):
        sums = np.clip(sums, -(2**31), 2**31 - 1)
    after[instruction.target] = 0
    after[instruction.target][:size] = sums.astype(np.int32).view(np.uint8)
    return after


def test_every_form_of_the_dots_does_what_the_instruction_would() -> None:
    rng = np.random.default_rng(0)
    instructions = [random_instruction(rng) for _ in range(NUM_INSTRUCTIONS)]
    texts = [function(f"dot{i}", x) for i, x in enumerate(instructions)]
    lines = [".intel_syntax noprefix", *"\n".join(texts).splitlines(), ".att_syntax"]
    module = "\n".join(f'module asm "{line}"' for line in lines)
    llvm.initialize_native_asmparser()
    row = foreign_row("avx512" if VECTOR_BYTES == 64 else avx_vnni.ROW)
    row = replace(row, features=f"{row.features},+avxvnni")
    loaded = load_object(compile_object(module, row))
    before = avx_vnni.num_handled()
    registers = aligned(16 * VECTOR_BYTES)
    for index, instruction in enumerate(instructions):
        registers[:] = random_bytes(rng, len(registers))
        after = expected(instruction, registers.reshape(16, -1))
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(loaded.address(f"dot{index}"))(
            registers.ctypes.data
        )
        np.testing.assert_array_equal(
            registers.reshape(16, -1), after, f"{instruction.setup}; {instruction.text}"
        )
    assert avx_vnni.num_handled() - before == NUM_INSTRUCTIONS


def test_another_illegal_instruction_ends_the_process_as_ever() -> None:
    script = """
import ctypes, mmap
from tests.unit.llvm import avx_vnni
avx_vnni.install()
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(b"\\x0f\\x0b")  # ud2
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True)
    assert done.returncode == -signal.SIGILL, done.stderr


def test_the_row_s_own_code_comes_to_the_handler() -> None:
    quads = np.arange(LANES, dtype=np.int32)
    before = avx_vnni.num_handled()
    apply(
        row_named(avx_vnni.ROW),
        lambda lanes, x: lanes.dot_int8(x, x, x),
        quads,
        (I32, I32),
        np.int32,
    )
    assert avx_vnni.num_handled() == before + LANES * 4 // 32

"""Instruction sets are a table; kernels ask a row what it has and never name a processor.

A row's code gives the same bits on every processor that can run it. Adding an instruction set
is adding a row, and a dot in the kernels if it brings one.
"""

import os
from dataclasses import dataclass, replace
from functools import cache

import llvmlite.binding as llvm

from tokenmill.errors import UsageError

ENVIRONMENT_VARIABLE = "TOKENMILL_ISA"


@dataclass(frozen=True, kw_only=True)
class Row:
    """An instruction set: what a host must have for it, and what kernels may use.

    `cpu` and `features` are LLVM's names; in `ROWS` they are empty where the host decides, and
    `pick_row` fills them in.
    """

    name: str
    arch: str | None  # first part of the target triple; None: any
    required: tuple[str, ...]  # LLVM names of the features that the host must have
    vector_bytes: int  # widest register
    num_registers: int  # of that width
    has_bf16_dot: bool
    has_int8_dot: bool
    has_fma: bool
    has_half: bool  # conversions from and to f16 and bf16 are instructions
    cpu: str = ""
    features: str = ""


ROWS = (
    Row(
        name="avx512-bf16",
        arch="x86_64",
        required=("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16", "avx512vnni"),
        vector_bytes=64,
        num_registers=32,
        has_bf16_dot=True,
        has_int8_dot=True,
        has_fma=True,
        has_half=True,
    ),
    Row(
        name="portable",
        arch=None,
        required=(),
        vector_bytes=16,
        num_registers=16,
        has_bf16_dot=False,
        has_int8_dot=False,
        has_fma=False,
        has_half=False,
        cpu="generic",
    ),
)
"""In order of preference; the last runs anywhere."""


def pick_row(forced: str | None = None) -> Row:
    """The best row this host supports, or the one that `forced` or TOKENMILL_ISA names.

    Raises UsageError if that name is unknown, or the host lacks what the row needs.
    """
    wanted = forced or os.environ.get(ENVIRONMENT_VARIABLE)
    if not wanted:
        return _resolve(next(row for row in ROWS if not missing_features(row)))
    row = next((row for row in ROWS if row.name == wanted), None)
    if row is None:
        raise UsageError(f"unknown instruction set {wanted!r}: choose one of {_known_rows()}")
    if missing := missing_features(row):
        raise UsageError(
            f"instruction set {wanted!r} needs {', '.join(missing)}, which this host "
            f"({host_arch()}, {host_cpu()}) does not have: choose one of {_known_rows()}"
        )
    return _resolve(row)


def missing_features(row: Row) -> tuple[str, ...]:
    """What this host lacks for the row; empty if it can run it."""
    if row.arch not in (None, host_arch()):
        return (row.arch or "",)
    return tuple(name for name in row.required if not host_features().get(name))


def _known_rows() -> str:
    return ", ".join(
        row.name if not missing_features(row) else f"{row.name} (not on this host)" for row in ROWS
    )


def _resolve(row: Row) -> Row:
    """Fill in what the host decides: schedule for this very processor, use all it has."""
    if row.cpu:
        return row
    features = [("+" if on else "-") + name for name, on in sorted(host_features().items())]
    if row.arch == "x86_64":
        # Some models ask for 256-bit vectors by default; our tiles are written in 512.
        features = [f for f in features if f[1:] != "prefer-256-bit"] + ["-prefer-256-bit"]
    return replace(row, cpu=host_cpu(), features=",".join(features))


def make_target_machine(row: Row, opt_level: int = 2) -> llvm.TargetMachine:
    """LLVM's code generator for the row. Code is position independent and calls near."""
    initialize()
    target = llvm.Target.from_triple(host_triple())
    return target.create_target_machine(
        cpu=row.cpu, features=row.features, opt=opt_level, reloc="pic", codemodel="small"
    )


@cache
def initialize() -> None:
    """Set up LLVM for the host's architecture only; 0.3 ms."""
    # The tiles are written in the order in which they should run: hoisting their loads spills.
    llvm.set_option("tokenmill", "--enable-misched=false")
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


@cache
def host_features() -> dict[str, bool]:
    """Feature name to whether processor and operating system both support it."""
    return dict(llvm.get_host_cpu_features())


@cache
def host_cpu() -> str:
    """LLVM's name of the processor, e.g. znver5."""
    return str(llvm.get_host_cpu_name())


@cache
def host_triple() -> str:
    return str(llvm.get_process_triple())


def host_arch() -> str:
    """The first part of the target triple, e.g. x86_64 or aarch64."""
    return host_triple().split("-")[0]

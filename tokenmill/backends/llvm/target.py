"""Instruction sets are a table; kernels ask a row what it has and never name a processor.

A row's code gives the same bits on every processor that can run it. Adding an instruction set
is adding a row, and a dot in the kernels if it brings one.
"""

import os
import sys
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import llvmlite.binding as llvm

from tokenmill.backends.llvm import hwcap
from tokenmill.errors import UsageError
from tokenmill.ir.order import LANES

ENVIRONMENT_VARIABLE = "TOKENMILL_ISA"


MOST_TILE_ROWS = 12
"""Activation rows of the largest tile on any row of the table."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """An instruction set: what a host must have for it, and what kernels may use.

    `cpu` and `features` are LLVM's names; in `ROWS` they are empty where the host decides, and
    `pick_row` fills them in. A dot is named by its instruction; `lanes.py` says what it is in
    the IR, and what stands in for it where there is none.
    """

    name: str
    arch: str | None  # first part of the target triple; None: any
    required: tuple[str, ...]  # LLVM names of the features that the host must have
    vector_bytes: int  # widest register
    num_registers: int  # of that width
    bf16_dot: Literal["vdpbf16ps", "bfdot"] | None = None
    int8_dot: Literal["vpdpbusd", "vpmaddubsw", "usdot", "sdot"] | None = None
    has_fma: bool = True
    has_half: bool = True  # conversions from and to f16 are instructions
    has_word_table: bool = False  # looks up 16-bit words in a table of 64, in registers
    cpu: str = ""
    features: str = ""

    @property
    def tile_rows(self) -> int:
        """Activation rows of the largest tile: its sums take three quarters of the registers."""
        per_row = 2 * LANES * 4 // self.vector_bytes
        return min(MOST_TILE_ROWS, max(1, self.num_registers * 3 // 4 // per_row))

    @property
    def wide_rows(self) -> int:
        """Up to so many rows a tile serves two pairs, which keeps more loads in flight."""
        return self.tile_rows // 3


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")

ROWS = (
    Row(
        name="avx512-bf16",
        arch="x86_64",
        required=(*_AVX512, "avx512bf16", "avx512vnni"),
        vector_bytes=64,
        num_registers=32,
        bf16_dot="vdpbf16ps",
        int8_dot="vpdpbusd",
        has_word_table=True,
    ),
    Row(
        name="avx512-vnni",
        arch="x86_64",
        required=(*_AVX512, "avx512vnni"),
        vector_bytes=64,
        num_registers=32,
        int8_dot="vpdpbusd",
        has_word_table=True,
    ),
    Row(
        name="avx512",
        arch="x86_64",
        required=_AVX512,
        vector_bytes=64,
        num_registers=32,
        int8_dot="vpmaddubsw",
        has_word_table=True,
    ),
    Row(
        name="avx2-vnni",
        arch="x86_64",
        required=(*_AVX2, "avxvnni"),
        vector_bytes=32,
        num_registers=16,
        int8_dot="vpdpbusd",
    ),
    Row(
        name="avx2",
        arch="x86_64",
        required=_AVX2,
        vector_bytes=32,
        num_registers=16,
        int8_dot="vpmaddubsw",
    ),
    Row(
        name="neon-bf16",
        arch="aarch64",
        required=("neon", "dotprod", "i8mm", "bf16"),
        vector_bytes=16,
        num_registers=32,
        bf16_dot="bfdot",
        int8_dot="usdot",
    ),
    Row(
        name="neon-dotprod",
        arch="aarch64",
        required=("neon", "dotprod"),
        vector_bytes=16,
        num_registers=32,
        int8_dot="sdot",
    ),
    Row(name="neon", arch="aarch64", required=("neon",), vector_bytes=16, num_registers=32),
    Row(
        name="portable",
        arch=None,
        required=(),
        vector_bytes=16,
        num_registers=16,
        has_fma=False,
        has_half=False,
        cpu="generic",
    ),
)
"""In order of preference; the last runs anywhere. Nothing is computed for a row but the one
that is picked, so that the length of the table costs nothing."""


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
    missing = {row.name: missing_features(row) for row in ROWS}
    here = ", ".join(name for name, lacks in missing.items() if not lacks)
    elsewhere = ", ".join(name for name, lacks in missing.items() if lacks)
    return f"{here} (not on this host: {elsewhere})" if elsewhere else here


def _resolve(row: Row) -> Row:
    """Fill in what the host decides: schedule for this very processor, use all the row may."""
    if row.cpu:
        return row
    foreign = _foreign_features(row)
    features = [("+" if on else "-") + name for name, on in sorted(host_features().items())]
    # The last word counts, and what is taken away takes along what builds on it.
    features = [f for f in features if f[1:] not in foreign] + [f"-{name}" for name in foreign]
    return replace(row, cpu=host_cpu(), features=",".join(features))


def _foreign_features(row: Row) -> list[str]:
    """What better rows of the architecture need and this one does not: forced, it must run
    where they cannot. Also a preference for 256-bit vectors, which some models of processor have:
    our tiles are written for the row's width.
    """
    better = ROWS[: [other.name for other in ROWS].index(row.name)]
    others = {name for other in better if other.arch == row.arch for name in other.required}
    preference = {"prefer-256-bit"} if row.arch == "x86_64" else set()
    return sorted(others - set(row.required)) + sorted(preference)


def foreign_row(name: str) -> Row:
    """A row that this host cannot run, to look at its code: for any processor that can."""
    row = next(row for row in ROWS if row.name == name)
    return replace(row, cpu="generic", features=",".join(f"+{f}" for f in row.required))


def make_target_machine(row: Row, opt_level: int = 2) -> llvm.TargetMachine:
    """LLVM's code generator for the row. Code is position independent and calls near."""
    initialize()
    triple = host_triple()
    if row.arch not in (None, host_arch()):
        _initialize_foreign()
        triple = f"{row.arch}-unknown-linux-gnu"
    target = llvm.Target.from_triple(triple)
    return target.create_target_machine(
        cpu=row.cpu, features=row.features, opt=opt_level, reloc="pic", codemodel="small"
    )


@cache
def _initialize_foreign() -> None:
    """Set up LLVM for every architecture it knows, for rows that this host cannot run."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


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
    found = dict(llvm.get_host_cpu_features())
    if host_arch() == "aarch64" and sys.platform == "linux":
        found |= hwcap.features_of(hwcap.read_words())
    return found


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

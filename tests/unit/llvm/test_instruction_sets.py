"""Every row of the table compiles, with the instructions that it is there for; also Arm's, here."""

import re

import pytest

from tests.file_check import check
from tests.unit.llvm.native import FOREIGN_NAMES, ROW_NAMES
from tokenmill.backends.llvm.compile import assembly, compile_object
from tokenmill.backends.llvm.emit import Module
from tokenmill.backends.llvm.packing import PACKINGS
from tokenmill.backends.llvm.target import ROWS, Row, foreign_row, host_arch, pick_row
from tokenmill.backends.llvm.tiles import Tile, emit_tile

EXPECTED = {
    "avx512-vnni": {"bf16": "vfmadd{{[0-9]+}}ps{{.*}}%zmm", "int8": "vpdpbusd{{.*}}%zmm"},
    "avx512": {"bf16": "vfmadd{{[0-9]+}}ps{{.*}}%zmm", "int8": "vpmaddubsw{{.*}}%zmm"},
    "avx2-vnni": {"bf16": "vfmadd{{[0-9]+}}ps{{.*}}%ymm", "int8": "{vex} vpdpbusd{{.*}}%ymm"},
    "avx2": {"bf16": "vfmadd{{[0-9]+}}ps{{.*}}%ymm", "int8": "vpmaddubsw{{.*}}%ymm"},
    "neon-bf16": {"bf16": "bfdot{{.*}}v{{[0-9]+}}.4s", "int8": "usdot{{.*}}v{{[0-9]+}}.4s"},
    "neon-dotprod": {"bf16": "fmla{{.*}}v{{[0-9]+}}.4s", "int8": "sdot{{.*}}v{{[0-9]+}}.4s"},
    "neon": {"bf16": "fmla{{.*}}v{{[0-9]+}}.4s", "int8": "m{{ul|la}}{{.*}}v{{[0-9]+}}.4s"},
}
FORBIDDEN = {
    "avx512-vnni": "vdpbf16ps",
    "avx512": "vdpbf16ps|vpdpbusd",
    "avx2-vnni": "zmm|vdpbf16ps|ymm1[6-9]|ymm[23][0-9]",
    "avx2": "zmm|vdpbf16ps|vpdpbusd|ymm1[6-9]|ymm[23][0-9]",
    "neon-dotprod": "bfdot|usdot|bfcvt",
    "neon": "bfdot|usdot|sdot|bfcvt",
}
HERE = [
    row.name
    for row in ROWS
    if row.name in EXPECTED and (row.arch == host_arch() or row.name in FOREIGN_NAMES)
]
"""Those that LLVM can write here, whether or not this processor runs them."""


def written_row(name: str) -> Row:
    return pick_row(name) if name in ROW_NAMES else foreign_row(name)


def tile_text(name: str, kind: tuple[str, str], rows: int = 1) -> str:
    module = Module("tile")
    tile = Tile(format=kind[0], dot=kind[1], groups=8, pairs=1)
    emit_tile(module, written_row(name), tile, rows)
    return str(module)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dot", ["bf16", "int8"])
def test_a_row_s_dot_is_its_instruction(name: str, dot: str) -> None:
    check(
        assembly(tile_text(name, ("q4", dot)), written_row(name)),
        f"""
        CHECK:     tile_q4_{dot}
        CHECK:     {EXPECTED[name][dot]}
        CHECK-NOT: {{{{call|bl }}}}
        CHECK:     ret
        """,
    )


@pytest.mark.parametrize("name", [name for name in HERE if name in FORBIDDEN])
def test_a_row_uses_nothing_that_its_processors_may_lack(name: str) -> None:
    row = written_row(name)
    for kind in PACKINGS:
        text = assembly(tile_text(name, kind, row.tile_rows), row)
        assert not re.search(rf"\b({FORBIDDEN[name]})\b", text), kind


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_kernels_for_another_architecture_become_its_objects(name: str) -> None:
    row, module = written_row(name), Module("tiles")
    for kind in PACKINGS:
        emit_tile(module, row, Tile(format=kind[0], dot=kind[1], groups=8, pairs=1), row.tile_rows)
    code = compile_object(str(module), row)
    assert (code[:4], code[18]) == (b"\x7fELF", 183)  # EM_AARCH64

"""What the code generator writes, read: unpacking, dots, order of sums, barriers, no surprises."""

import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.file_check import check
from tests.unit.llvm.native import ROW_NAMES
from tokenmill.backends.llvm.compile import assembly, optimized_ir
from tokenmill.backends.llvm.emit import Module
from tokenmill.backends.llvm.lower import Options, lower
from tokenmill.backends.llvm.packing import PACKINGS
from tokenmill.backends.llvm.program import Numerics, optimize, tile_ir
from tokenmill.backends.llvm.target import Row, pick_row
from tokenmill.backends.llvm.tiles import Tile, emit_tile
from tokenmill.ir.graph import Graph
from tokenmill.models.architectures import llama
from tokenmill.models.config import LayerKind, ModelConfig, Rope

NATIVE = "avx512-bf16"
needs_native = pytest.mark.skipif(NATIVE not in ROW_NAMES, reason=f"needs {NATIVE}")

CONFIG = ModelConfig(
    architecture="llama",
    name="tiny",
    vocab_size=100,
    hidden_size=96,
    layers=(LayerKind(rope=Rope(theta=1e4)),) * 2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rotary_dim=32,
    intermediate_size=160,
    norm_eps=1e-5,
    context_length=64,
    is_tied=False,
    has_attention_bias=True,
)


def tile_text(kind: tuple[str, str], row: str, *, rows: int = 1, pairs: int = 1) -> str:
    """The IR of one kernel as it is emitted."""
    module = Module("tile")
    tile = Tile(format=kind[0], dot=kind[1], groups=3, pairs=pairs)
    emit_tile(module, pick_row(row), tile, rows)
    return str(module)


def small_graph(activations: str, cache: str, formats: tuple[str, ...]) -> Graph:
    """A small Llama after all passes, its weights in these formats by turns."""
    graph = llama.build(CONFIG)
    names = [n for n, kind in graph.weights().items() if kind.dtype == "w"]
    chosen = {n: formats[i % len(formats)] for i, n in enumerate(names)}
    return optimize(graph, chosen, Numerics(activations=activations, cache=cache))


@cache
def modules(row: Row) -> dict[str, str]:
    """The text of every kind of module that is generated, by name."""
    made = {}
    for activations, kv in (("bf16", "bf16"), ("int8", "int8"), ("f32", "f32")):
        options = Options(row=row, activations=activations, max_tokens=16, max_rows=4)
        graph = small_graph(activations, kv, ("q4", "q8", "bf16", "f32", "q4"))
        made[f"step-{activations}-{kv}"] = lower(graph, options).ir_text
    for rows, pairs in ((1, 2), (row.tile_rows, 1)):
        kinds = [Tile(format=f, dot=d, groups=3, pairs=pairs) for f, d in PACKINGS]
        made[f"tiles-{rows}"] = tile_ir(kinds, options, rows)
    return made


@pytest.fixture(params=ROW_NAMES)
def row(request: pytest.FixtureRequest) -> Row:
    return pick_row(request.param)


# -- unpacking and dots


@needs_native
def test_a_nibble_becomes_a_bfloat_with_an_and_and_an_or() -> None:
    """Bits 0x4300 are the bfloat16 128, and a nibble in its low bits adds itself."""
    check(
        optimized_ir(tile_text(("q4", "bf16"), NATIVE), pick_row(NATIVE)),
        f"""
        CHECK:      [[WORD:%\\w+]] = load <16 x i32>
        CHECK:      [[LOW:%\\w+]] = and <16 x i32> [[WORD]], splat (i32 {0x000F000F})
        CHECK-NEXT: or disjoint <16 x i32> [[LOW]], splat (i32 {0x43004300})
        CHECK:      call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512
        CHECK:      [[NEXT:%\\w+]] = lshr <16 x i32> [[WORD]], splat (i32 4)
        CHECK-NEXT: [[HIGH:%\\w+]] = and <16 x i32> [[NEXT]], splat (i32 {0x000F000F})
        CHECK-NEXT: or disjoint <16 x i32> [[HIGH]], splat (i32 {0x43004300})
        """,
    )


@needs_native
@pytest.mark.parametrize(
    ("kind", "instruction"),
    [
        (("q4", "bf16"), "vdpbf16ps"),
        (("q8", "bf16"), "vdpbf16ps"),
        (("bf16", "bf16"), "vdpbf16ps"),
        (("q4", "int8"), "vpdpbusd"),
        (("q8", "int8"), "vpdpbusd"),
        (("q4", "f32"), "vfmadd{{[0-9]+}}ps"),
        (("f32", "f32"), "vfmadd{{[0-9]+}}ps"),
    ],
)
def test_each_kind_of_dot_is_the_processor_s_instruction(kind, instruction) -> None:
    check(
        assembly(tile_text(kind, NATIVE), pick_row(NATIVE)),
        f"""
        CHECK:     tile_{kind[0]}_{kind[1]}
        CHECK:     [[LOOP:\\.LBB[0-9_]+]]:
        CHECK:     {instruction}{{{{.*}}}}%zmm
        CHECK-NOT: call
        CHECK:     j{{{{.*}}}}[[LOOP]]
        CHECK:     ret
        """,
    )


@needs_native
@pytest.mark.parametrize("kind", PACKINGS, ids="-".join)
def test_decoding_kernels_keep_their_sums_in_registers(kind: tuple[str, str]) -> None:
    for rows, pairs in ((1, 1), (1, 2)):
        text = assembly(tile_text(kind, NATIVE, rows=rows, pairs=pairs), pick_row(NATIVE))
        # K formats unpack their factors onto the stack, outside of the loop of dots.
        for block in re.split(r"^\.LBB\w+:", text, flags=re.MULTILINE):
            if re.search(r"vdpbf16ps|vpdpbusd|vfmadd", block):
                assert not re.search(r"zmm\d+, .*\(%rsp", block), f"{rows} rows, {pairs} pairs"


def test_the_portable_row_uses_plain_vectors() -> None:
    text = assembly(tile_text(("q4", "bf16"), "portable"), pick_row("portable"))
    assert not re.search(r"[yz]mm\d|vdpbf16ps|vpdpbusd|vfmadd", text)


# -- the order of sums


@needs_native
@pytest.mark.parametrize("kind", [("q4", "f32"), ("q4", "bf16"), ("q4", "int8")], ids="-".join)
def test_the_scale_is_added_before_the_minimum(kind: tuple[str, str]) -> None:
    """acc = fma(scale, dot, acc), then acc = fma(minimum, sum of x, acc)."""
    check(
        optimized_ir(tile_text(kind, NATIVE), pick_row(NATIVE)),
        """
        CHECK:      [[ACC:%[\\w.]+]] = phi <16 x float> {{.*}}, [ [[TOTAL:%\\w+]],
        CHECK:      [[SCALED:%\\w+]] = call {{.*}} @llvm.fma.v16f32({{.*}}, <16 x float> [[ACC]])
        CHECK:      [[TOTAL]] = call {{.*}} @llvm.fma.v16f32({{.*}}, <16 x float> [[SCALED]])
        """,
    )


def test_without_the_instruction_the_scale_is_multiplied_then_added() -> None:
    check(
        optimized_ir(tile_text(("q8", "f32"), "portable"), pick_row("portable")),
        """
        CHECK:      [[ACC:%[\\w.]+]] = phi <16 x float> {{.*}}, [ [[TOTAL:%\\w+]],
        CHECK:      splat (float 0x46F0000000000000)
        CHECK:      [[SCALED:%\\w+]] = fmul <16 x float> %
        CHECK-NEXT: [[TOTAL]] = fadd <16 x float> [[SCALED]], [[ACC]]
        """,
    )


def test_no_module_allows_llvm_to_reorder_or_to_contract(row: Row) -> None:
    for name, text in modules(row).items():
        for stage in (text, optimized_ir(text, row)):
            found = re.search(r"= f\w+ (fast|reassoc|contract|nnan|ninf|nsz|arcp|afn)\b.*", stage)
            assert found is None, f"{name}: {found}"
            assert not re.search(r"\b(fast|reassoc|contract)\b|unsafe-fp-math|fmuladd", stage), name


@needs_native
def test_a_product_and_a_sum_are_not_fused_behind_our_back() -> None:
    module = Module("apart")
    f = module.function("apart", "float", [(n, "float") for n in "abc"], public=True)
    a, b, c = f.parameters
    f.ret(a * b + c)
    check(
        assembly(str(module), pick_row(NATIVE)),
        """
        CHECK:     vmulss
        CHECK-NOT: fmadd
        CHECK:     vaddss
        """,
    )


# -- what a module needs


def test_modules_call_nothing_but_intrinsics_and_themselves(row: Row) -> None:
    for name, text in modules(row).items():
        declared = re.findall(r"^declare .*@([\w.]+)\(", text, re.MULTILINE)
        assert all(symbol.startswith("llvm.") for symbol in declared), name
        defined = re.findall(r"^define .*@([\w.]+)\(", text, re.MULTILINE)
        called = set(re.findall(r"\bcall [^@\n]*@([\w.]+)\(", text))
        assert called <= {*declared, *defined}, name


def test_code_calls_nothing_outside_its_object(row: Row) -> None:
    """No library function, whatever LLVM made of the IR: not for halves, not for fma."""
    for name, text in modules(row).items():
        code = assembly(text, row)
        outside = set(called_functions(code)) - set(re.findall(r"^_?([\w.]+):", code, re.MULTILINE))
        assert not outside, name


def called_functions(code: str) -> Iterator[str]:
    """Functions that assembly names in calls, on x86 and ARM."""
    return (
        m[1] for m in re.finditer(r"^\s+(?:callq?|bl)\s+_?([A-Za-z][\w.]*)", code, re.MULTILINE)
    )


def test_the_portable_row_has_no_intrinsics_of_a_processor() -> None:
    """But for the pause of a waiting thread, which every processor of the family has."""
    for name, text in modules(pick_row("portable")).items():
        found = set(re.findall(r"@(llvm\.(?:x86|aarch64|arm)\.[\w.]+)", text))
        assert found <= {"llvm.x86.sse2.pause", "llvm.aarch64.isb"}, name
        assert not re.search(r"\b(fpext|fptrunc)\b", text), name


# -- phases


def test_barriers_stand_where_the_pass_puts_them(row: Row) -> None:
    """The phases of a layer in order, and a barrier wherever threads change their share."""
    options = Options(row=row, activations="bf16", max_tokens=16, max_rows=4)
    graph = small_graph("bf16", "bf16", ("q4",))
    text = lower(graph, options).ir_text
    check(
        text,
        """
        CHECK:     define internal void @layer(
        CHECK-NOT: call void @layer
        CHECK:     call void @barrier(
        CHECK:     call void @layer.q.finish(
        CHECK:     call void @layer.k.finish(
        CHECK:     call void @layer.v.finish(
        CHECK:     call void @barrier(
        CHECK-NOT: call void @layer
        CHECK:     atomicrmw add ptr {{.*}} monotonic
        CHECK:     call void @barrier(
        CHECK:     call void @layer.o.finish(
        CHECK:     call void @barrier(
        CHECK-NOT: call void @layer
        CHECK:     call void @barrier(
        CHECK:     call void @layer.gate.finish(
        CHECK:     call void @barrier(
        CHECK:     call void @layer.down.finish(
        CHECK:     call void @barrier(
        CHECK-NOT: call
        CHECK:     ret void
        """,
    )
    for function in graph.functions:
        name = "step" if function is graph.main else function.name
        body = text[text.index(f" void @{name}(") :]
        count = body[: body.index("\n}")].count("call void @barrier(")
        assert count == sum(n.op == "barrier" for n in function.nodes), name


def test_layers_share_one_body(row: Row) -> None:
    options = Options(row=row, activations="f32", max_tokens=16, max_rows=4)
    check(
        lower(small_graph("f32", "f32", ("f32",)), options).ir_text,
        """
        CHECK:     @layers.order = internal constant [2 x i32] [i32 0, i32 0]
        CHECK:     define void @step(
        CHECK:     call void @layer(
        CHECK-NOT: call void @layer(
        CHECK:     call void @sample_row(
        """,
    )


def test_each_phase_of_each_layer_has_a_counter_of_its_own(row: Row) -> None:
    """Threads that are still in one phase must not take items of the next, or of another layer."""
    options = Options(row=row, activations="bf16", max_tokens=16, max_rows=4)
    program = lower(small_graph("bf16", "bf16", ("q4",)), options)
    name = r"@(?:layer|step)\("
    bodies = [b for b in program.ir_text.split("\ndefine ") if re.search(name, b.split("\n")[0])]
    drawn = [drawn_counters(body) for body in bodies]
    assert sorted(map(len, drawn)) == [1, 7]  # the head; q, k, v, attention, o, gate and up, down
    assert all(len(set(numbers)) == len(numbers) for numbers in drawn)
    stride = len(CONFIG.layers) + 1  # main draws too
    assert all(number % stride == 0 for numbers in drawn for number in numbers)
    assert program.num_counters == 7 * stride


def drawn_counters(body: str) -> list[int]:
    """What is added to the layer's index to find each counter that a function draws from."""
    lines = {m[1]: m[2] for m in re.finditer(r"^ *(%[\w.]+) = (.*)$", body, re.M)}
    found = []
    for pointer in re.findall(r"atomicrmw add ptr (%[\w.]+),", body):
        [offset] = re.findall(r", i64 (%[\w.]+)$", lines[pointer])
        [index] = re.findall(r"mul i64 ([%\w.]+), 64$", lines[offset])
        [number] = re.findall(r"add i64 [%\w.]+, (\d+)$", lines[index])
        found.append(int(number))
    return found

import re
import sys

import pytest
from gguf import GGMLQuantizationType

from tests.unit.llvm.native import ROW_NAMES
from tests.unit.model_files import random_weights, write_gguf
from tokenmill.backends.llvm.target import pick_row
from tokenmill.cli.listing import Style, heart_of
from tokenmill.cli.main import main
from tokenmill.cli.subject import load_subject, named_values
from tokenmill.ir.ops import OPS
from tokenmill.models.provenance import trace_build
from tokenmill.passes.pipeline import SPMD_PASSES, numeric_passes

HEADINGS = ("1. In the model", "2. As built", "3. Through the passes", "4. LLVM IR", "5. Assembly")


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """Nothing is on disk, and nothing may be fetched."""
    monkeypatch.setenv("TOKENMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("TOKENMILL_ISA", raising=False)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exited:
        main(["explain", *arguments])
    out, err = capsys.readouterr()
    return exited.value.code, out, err


def explained(capsys, *arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    return out


def part(out, number):
    """One of the five parts."""
    starts = [out.index(f"\n{heading}") for heading in HEADINGS]
    return out[starts[number - 1] : [*starts, len(out)][number]]


def test_the_life_is_told_from_the_model_to_assembly(capsys):
    out = explained(capsys, "--op", "gate")
    assert [out.index(heading) for heading in HEADINGS] == sorted(map(out.index, HEADINGS))
    assert 'gate = f.linear(h, f.weight("gate", inner, hidden))' in part(out, 1)
    assert "%gate = linear(%rmsnorm.1, @gate) : f32[T,1536]" in part(out, 2)
    assert "layer.gate.finish" in part(out, 4)
    assert "tile_q4_bf16_g18" in part(out, 5)


def test_the_work_of_a_phase_is_that_of_its_weights_when_it_decodes(capsys):
    """gate and up, 1536 x 576 each, in 5 bits a weight; two FLOPs a weight and token."""
    text = part(explained(capsys, "--op", "gate"), 3)
    [decode, prompt] = re.findall(r": ([\d,.]+) MFLOP, ([\d,.]+) MB, ([\d,.]+) FLOP a byte", text)
    flops, size, intensity = map(float, decode)
    assert flops == pytest.approx(4 * 1536 * 576 / 1e6, rel=0.01)
    assert size == pytest.approx(2 * 1536 * 576 * 5 / 8 / 1e6, rel=0.01)
    assert intensity == pytest.approx(flops / size, rel=0.05)
    assert float(prompt[2]) > 100 * intensity


def test_the_line_that_makes_the_value_is_marked(capsys):
    marked = re.findall(r"^ +\d+ > (.*)$", explained(capsys, "--op", "rope.1"), re.MULTILINE)
    assert [line.strip() for line in marked] == [
        "k = f.rope(k, place, head_dim=head_dim, **kind.rope.attrs)"
    ]


def test_passes_have_their_number_and_their_reason_and_show_what_is_new(capsys):
    passes = (*numeric_passes(formats={}, activations="bf16", cache="bf16"), *SPMD_PASSES)
    numbers = {name: number for number, (name, _) in enumerate(passes, start=1)}
    text = part(explained(capsys, "--op", "q"), 3)
    found = re.findall(r"^pass (\d+), (\w+)$", text, re.MULTILINE)
    assert found == [
        (str(numbers[name]), name)
        for name in ("choose_formats", "round_activations", "fuse_qkv", "place_barriers")
    ]
    assert "Merge the q, k and v projections" in text
    assert "  + where %rmsnorm: f32[T,576], @q: q4[576,576]" in text
    assert "  + %q = linear(%rmsnorm.bf16, @q) : f32[T,576]" in text
    assert "  +   %rope = rope(%q, %place)" in text
    assert "  + barrier()" in text


def test_every_value_of_the_list_can_be_explained(capsys):
    lines = explained(capsys, "--list").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("NAME"))
    names = [line.split()[0] for line in lines[start + 1 :] if line and "stands for" not in line]
    assert {"q", "kv", "attention", "gate", "rmsnorm", "main.rmsnorm", "sample"} <= set(names)
    for name in names:
        assert part(explained(capsys, "--op", name), 5).count("\n") > 8


def test_an_operation_stands_for_its_first_value(capsys):
    assert explained(capsys, "--op", "linear").startswith("The life of `q`, a `linear` in ")
    out = explained(capsys, "--op", "kv_write")
    assert out.startswith("The life of `kv`, a `kv_write` in ")
    assert "layer.k.finish" in out
    assert "layer.v.finish" in out
    assert "\nlayer.q.finish\n" not in out


def test_an_operation_that_a_pass_makes_is_shown_with_what_it_is_made_of(capsys):
    out = explained(capsys, "--op", "round")
    assert out.startswith("The life of rmsnorm in ")
    assert "(round is made by the pass round_activations, here of `rmsnorm`" in out
    assert re.search(r"\+ .*%rmsnorm\.bf16 = round\(%rmsnorm", part(out, 3))


def test_every_operation_of_the_table_can_be_explained(capsys):
    for op in OPS:
        assert part(explained(capsys, "--op", op), 5).count("\n") > 8


@pytest.mark.parametrize("isa", ROW_NAMES)
@pytest.mark.parametrize("activations", ["bf16", "int8", "f32"])
def test_instruction_set_and_activations_are_chosen(capsys, isa, activations):
    out = explained(capsys, "--op", "down", "--isa", isa, "--activations", activations)
    row = pick_row(isa)
    multiply = "vfmadd" if row.has_fma else "mul"
    wanted = {"bf16": row.bf16_dot or multiply, "int8": row.int8_dot, "f32": multiply}
    assert (wanted[activations] or "") in part(out, 5)  # int8 on the portable row has no name
    for dot, lacks in (("vdpbf16ps", row.bf16_dot is None), ("vpdpbusd", row.int8_dot is None)):
        assert not (lacks and dot in part(out, 5))
    assert f"tile_q4_{activations}_g48" in out
    assert f"5. Assembly for {isa}" in out


def test_full_leaves_nothing_out(capsys):
    short = explained(capsys, "--op", "attention")
    full = explained(capsys, "--op", "attention", "--full")
    assert "more lines" in short
    assert "more lines" not in full
    assert full.count("\n") > 4 * short.count("\n")
    assert short.count("\n") < 250


def test_a_model_on_disk_is_explained_with_its_own_sizes_and_formats(capsys, tmp_path):
    weights = random_weights()
    encodings = {"layers.0.o": GGMLQuantizationType.Q8_0}
    path = write_gguf(tmp_path / "tiny.gguf", weights, encodings=encodings)
    out = explained(capsys, "--op", "o", "--model", str(path))
    assert "in tiny\n" in out
    n, k = weights["layers.0.o"].shape
    assert f"@o: q8[{n},{k}]" in out
    assert "on disk" not in out


def test_a_model_that_is_not_on_disk_is_not_fetched(capsys):
    out = explained(capsys, "--op", "q", "--model", "smollm2")
    assert "smollm2 is not on disk (`tokenmill pull smollm2` fetches it)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "conv"], "has no operation 'conv': choose one of rmsnorm, linear, rope,"),
        (["--op", "q", "--model", "nonsense"], "no model 'nonsense'"),
        (["--op", "q", "--model", "./absent.gguf"], "absent.gguf"),
        (["--op", "q", "--isa", "sse9"], "sse9"),
        ([], "--op"),
    ],
)
def test_wrong_use_is_one_line(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_colours_are_for_terminals(capsys, monkeypatch):
    assert "\033" not in explained(capsys, "--op", "silu")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Style.of(sys.stdout).bold("x") == "\033[1mx\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Style.of(sys.stdout).bold("x") == "x"


def test_the_heart_of_a_listing_is_its_largest_loop():
    prologue = [f"        movq %rax, {i}(%rsp)" for i in range(70)]
    loop = [f"        vaddps %zmm{i}, %zmm0, %zmm0" for i in range(20)]
    lines = ["f:", *prologue, ".LBB0_1:", *loop, "        jl .LBB0_1", "        retq"]
    assert heart_of("\n".join(lines)).splitlines() == [
        "f:", "        ... 70 more lines", ".LBB0_1:", *loop, "        jl .LBB0_1", "        retq",
    ]  # fmt: skip
    assert heart_of("\n".join(lines[60:])) == "\n".join(lines[60:])


def test_prefetches_are_left_out_of_a_long_listing_with_their_addresses():
    loop = [f"  %x{i} = add i32 %x, {i}" for i in range(60)]
    lines = ["define void @f() {", "loop:", *loop, "  %a = getelementptr i8, ptr %p, i64 64"]
    lines += [
        "  call void @llvm.prefetch.p0(ptr %a, i32 0)",
        "  br i1 %c, label %loop, label %end",
        "}",
    ]
    heart = heart_of("\n".join(lines))
    assert "prefetch" not in heart
    assert "getelementptr" not in heart
    assert "br i1 %c" in heart


def test_every_value_knows_the_lines_that_made_it():
    subject = load_subject("smollm2")
    for value in named_values(subject.graph):
        chain = subject.origins[value.function, value.node.result.name]
        assert all(line.path.parent.name == "architectures" for line in chain)
        assert chain[0].function == "build"


def test_watching_a_build_leaves_the_interpreter_as_it_was():
    before = sys.getprofile()
    trace_build(load_subject("smollm2").config)
    assert sys.getprofile() is before

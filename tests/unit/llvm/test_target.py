import ctypes

import pytest

from tokenmill.backends.llvm import hwcap, target
from tokenmill.backends.llvm.target import ROWS, missing_features, pick_row
from tokenmill.errors import UsageError


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch):
    """Pretend to be a host with these features."""

    def pretend(arch: str, *features: str) -> None:
        monkeypatch.delenv("TOKENMILL_ISA", raising=False)
        monkeypatch.setattr(target, "host_triple", lambda: f"{arch}-unknown-linux-gnu")
        monkeypatch.setattr(target, "host_features", lambda: dict.fromkeys(features, True))
        monkeypatch.setattr(target, "host_cpu", lambda: "testcpu")

    return pretend


FULL = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16", "avx512vnni")


def test_the_best_row_that_the_host_supports_is_picked(host):
    host("x86_64", *FULL)
    assert pick_row().name == "avx512-bf16"
    host("x86_64", *FULL[:4], "avx512vnni")
    assert pick_row().name == "avx512-vnni"
    host("x86_64", *FULL[:-1])
    assert pick_row().name == "avx512"
    host("x86_64", "avx2", "fma", "f16c", "avxvnni")
    assert pick_row().name == "avx2-vnni"
    host("x86_64", "avx2", "fma", "f16c")
    assert pick_row().name == "avx2"
    host("x86_64", "avx2")
    assert pick_row().name == "portable"
    host("aarch64", "neon", "dotprod", "i8mm", "bf16")
    assert pick_row().name == "neon-bf16"
    host("aarch64", "neon", "dotprod")
    assert pick_row().name == "neon-dotprod"
    host("aarch64", "neon")
    assert pick_row().name == "neon"
    host("riscv64", "v")
    assert pick_row().name == "portable"


def test_code_for_the_host_uses_its_scheduling_and_wide_vectors(host):
    host("x86_64", *FULL, "prefer-256-bit")
    row = pick_row()
    assert row.cpu == "testcpu"
    assert "+avx512bf16" in row.features
    assert row.features.endswith("-prefer-256-bit")
    assert "+prefer-256-bit" not in row.features


def test_a_forced_row_leaves_out_what_only_better_rows_may_use(host):
    host("x86_64", *FULL, "avx2", "fma", "f16c", "avxvnni", "bmi2")
    assert "+avx512vnni" in pick_row("avx512-vnni").features
    off = {f for f in pick_row("avx2").features.split(",") if f.startswith("-")}
    assert off == {f"-{name}" for name in (*FULL, "avxvnni", "prefer-256-bit")}
    assert "+bmi2" in pick_row("avx2").features


def test_tiles_are_as_large_as_the_registers_allow(host):
    sizes = {row.name: (row.tile_rows, row.wide_rows) for row in ROWS}
    assert sizes["avx512"] == (12, 4)
    assert sizes["avx2"] == sizes["neon"] == (3, 1)
    assert sizes["portable"] == (1, 0)


def test_choosing_a_row_sets_up_no_architecture_but_this_one(monkeypatch):
    def refuse(*_):
        raise AssertionError("all of LLVM's architectures were set up")

    monkeypatch.setattr(target.llvm, "initialize_all_targets", refuse)
    target.make_target_machine(pick_row())


def test_the_portable_row_asks_for_nothing_beyond_the_architecture(host):
    host("x86_64", *FULL)
    row = pick_row("portable")
    assert (row.cpu, row.features) == ("generic", "")


def test_the_environment_forces_a_row_and_the_argument_wins(host, monkeypatch):
    host("x86_64", *FULL)
    monkeypatch.setenv("TOKENMILL_ISA", "portable")
    assert pick_row().name == "portable"
    assert pick_row("avx512-bf16").name == "avx512-bf16"


def test_an_unknown_row_is_refused_with_the_known_ones(host):
    host("x86_64", *FULL[:2])
    with pytest.raises(
        UsageError, match=r"unknown .*'sse9'.*: choose one of portable .not on.*bf16"
    ):
        pick_row("sse9")


def test_an_unsupported_row_is_refused_with_what_is_missing(host):
    host("x86_64", *FULL[:-1])
    with pytest.raises(UsageError, match=r"'avx512-bf16' needs avx512vnni.*x86_64, testcpu"):
        pick_row("avx512-bf16")
    host("aarch64")
    with pytest.raises(UsageError, match="needs x86_64"):
        pick_row("avx512-bf16")


def test_every_host_has_a_row():
    assert not missing_features(ROWS[-1])


GRAVITON3 = {hwcap.AT_HWCAP: 0xDFFFFFFF, hwcap.AT_HWCAP2: 0x1F201}
"""What Linux says of a Neoverse V1: SVE, dot product, i8mm and bf16."""


def test_linux_says_which_of_arm_s_extensions_there_are() -> None:
    features = hwcap.features_of(GRAVITON3)
    assert {n for n in ("neon", "dotprod", "i8mm", "bf16", "sve", "lse") if features[n]} == {
        *("neon", "dotprod", "i8mm", "bf16", "sve", "lse")
    }
    assert not features["sve2"]
    a72 = hwcap.features_of({hwcap.AT_HWCAP: 0xFF, hwcap.AT_HWCAP2: 0})
    assert {name for name, is_on in a72.items() if is_on} == {
        *("fp-armv8", "neon", "aes", "sha2", "crc")
    }


def test_what_arm_s_kernel_hides_is_said_to_be_off_though_the_processor_s_name_implies_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden = GRAVITON3 | {hwcap.AT_HWCAP: GRAVITON3[hwcap.AT_HWCAP] & ~(1 << 22)}
    monkeypatch.setattr(target, "host_triple", lambda: "aarch64-unknown-linux-gnu")
    monkeypatch.setattr(target, "host_cpu", lambda: "neoverse-v1")
    monkeypatch.setattr(target.llvm, "get_host_cpu_features", lambda: {"neon": True, "sve": True})
    monkeypatch.setattr(hwcap, "read_words", lambda: hidden)
    monkeypatch.setattr(target, "host_features", target.host_features.__wrapped__)
    row = pick_row()
    assert row.name == "neon-bf16"
    assert "-sve" in row.features.split(",")
    assert "+dotprod" in row.features.split(",")
    assert pick_row("neon-dotprod").features.endswith("-bf16,-i8mm")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "getauxval"), reason="needs getauxval")
def test_the_words_are_those_of_the_process() -> None:
    assert hwcap.read_words()[hwcap.AT_HWCAP] != 0

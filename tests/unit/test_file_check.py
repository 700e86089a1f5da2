"""The helper that other tests trust: it accepts what fits and refuses what does not."""

import pytest

from tests.file_check import check

TEXT = "%a = silu(%x)\n%b = add(%a, %x)\nreturn %b\n"


def test_lines_in_order_are_found() -> None:
    check(TEXT, "CHECK: silu\nCHECK-NEXT: add(%a\nCHECK-NOT: mul\nCHECK: return")


def test_names_are_captured() -> None:
    check(TEXT, "CHECK: [[A:%[a-z]+]] = silu\nCHECK: add([[A]], %x)")


@pytest.mark.parametrize(
    "pattern",
    [
        "CHECK: mul",
        "CHECK: return\nCHECK: silu",
        "CHECK: silu\nCHECK-NEXT: return",
        "CHECK-NOT: add",
        "CHECK: silu\nCHECK-NOT: add\nCHECK: return",
        "CHECK: [[A:%[a-z]+]] = silu\nCHECK: return [[A]]",
        "no check at all",
    ],
)
def test_what_does_not_fit_fails(pattern: str) -> None:
    with pytest.raises(pytest.fail.Exception):
        check(TEXT, pattern)

"""What the documents promise: commands that run, links that lead somewhere, equal READMEs."""

import re
from pathlib import Path

import pytest

from tokenmill.cli.main import COMMANDS
from tokenmill.passes.pipeline import SPMD_PASSES, numeric_passes

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def read(name: str) -> str:
    return (ROOT / name).read_text()


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)


def headings(text: str) -> list[int]:
    """The levels of the headings, in order."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [len(marks) for marks in re.findall(r"^(#+) ", outside, re.MULTILINE)]


def test_ci_runs_the_command_of_the_readme():
    _, test_command, *_ = code_blocks(read("README.md"))
    command = test_command.splitlines()[1]
    assert command in read(".ci/run").splitlines()


def test_the_two_readmes_are_in_step():
    english, chinese = read("README.md"), read("README.zh-CN.md")
    assert code_blocks(english) == code_blocks(chinese)
    assert headings(english) == headings(chinese)
    for pattern in (r"^\| ", r"^- ", r"^\d+\. "):
        assert len(re.findall(pattern, english, re.MULTILINE)) == len(
            re.findall(pattern, chinese, re.MULTILINE)
        )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("https://"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(name):
    """`models/loader.py` means the one in the package; short names follow a folder's name."""
    known = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py")}
    for mentioned in re.findall(r"`([a-z_\d/]+\.py)`", read(name)):
        assert any(f"/{path}".endswith(f"/{mentioned}") for path in known), mentioned


def test_every_pass_is_described():
    names = [name for name, _ in numeric_passes(formats={}, activations="f32", cache="f32")]
    for name in [*names, *(name for name, _ in SPMD_PASSES)]:
        assert f"| `{name}` |" in read("docs/architecture.md")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_described(command):
    assert f"\n## tokenmill {command}" in read("docs/cli.md")

import json
import subprocess
import sys

import pytest

import tokenmill
from tokenmill.cli.main import COMMANDS, main
from tokenmill.models.sources.aliases import ALIASES


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENMILL_HOME", str(tmp_path))
    return tmp_path


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    out, err = capsys.readouterr()
    return exited.value.code, out, err


def fail_with(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("tokenmill.cli.pull.fetch", fail)


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"tokenmill {tokenmill.__version__}\n", "")


def test_nothing_shows_the_help(capsys):
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert err.startswith("usage: tokenmill")


def test_help_lists_all_commands(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(f"\n    {command} " in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    code, out, _ = run(capsys, command, "-h")
    assert code == 0
    assert out.startswith(f"usage: tokenmill {command} ")


@pytest.mark.parametrize(
    "arguments",
    [
        *(["pul"], ["--bogus"], ["run"], ["run", "hi", "--max-tokens", "x"], ["pull", "--bogus"]),
        *(["run", "hi", "--raw", "--chat"], ["run", "hi", "--quantization", "q3"]),
    ],
)
def test_wrong_use_exits_with_2(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "--help" in err
    assert err.count("\n") == 1


def test_a_users_error_is_one_line(capsys):
    code, out, err = run(capsys, "pull", "smolm2")
    assert (code, out) == (2, "")
    assert err.startswith("error: no model 'smolm2': did you mean smollm2?")
    assert err.count("\n") == 1


def test_an_error_of_ours_is_one_line(capsys, monkeypatch):
    fail_with(monkeypatch, ZeroDivisionError("by zero\nand more"))
    code, _, err = run(capsys, "pull")
    assert code == 1
    assert err == (
        "error: internal error: ZeroDivisionError: by zero and more "
        "(run with --debug for the traceback)\n"
    )


@pytest.mark.parametrize("arguments", [["--debug", "pull"], ["pull", "--debug"]])
def test_debug_shows_the_traceback(capsys, monkeypatch, arguments):
    fail_with(monkeypatch, ZeroDivisionError("by zero"))
    code, _, err = run(capsys, *arguments)
    assert code == 1
    assert err.startswith("Traceback (most recent call last)")


def test_debug_after_the_options_is_an_argument(capsys):
    code, _, err = run(capsys, "pull", "--", "--debug")
    assert code == 2
    assert err.startswith("error: no model '--debug'")


def test_an_interrupt_exits_with_130(capsys, monkeypatch):
    fail_with(monkeypatch, KeyboardInterrupt())
    code, _, err = run(capsys, "pull")
    assert (code, err.strip()) == (130, "")


def test_a_message_cannot_steer_the_terminal(capsys):
    _, _, err = run(capsys, "pull", "\x1b[31mred\nline")
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_models_table(capsys):
    code, out, _ = run(capsys, "models")
    lines = out.splitlines()
    assert code == 0
    *table, _, _, models, code_line, packed = lines
    assert [line.split()[0] for line in table] == ["NAME", *ALIASES]
    assert "98.4 MB" in lines[1]
    assert [line.split()[-2:] for line in (models, code_line)] == [["0", "B"]] * 2
    assert "Packed weights: 0 B, with the code at most 30.0 GB" in packed


def test_models_shows_what_the_caches_take(capsys, home, monkeypatch):
    for name, size in (("objects", 1_500), ("packed", 3_000)):
        (home / name).mkdir(parents=True)
        (home / name / "entry.tmc").write_bytes(bytes(size))
    monkeypatch.setenv("TOKENMILL_CACHE_GB", "2.5")
    out = run(capsys, "models")[1]
    assert "Compiled code:  1.5 kB\n" in out
    assert "3.0 kB, with the code at most 2.5 GB (TOKENMILL_CACHE_GB)" in out
    monkeypatch.setenv("TOKENMILL_CACHE_GB", "much")
    code, _, err = run(capsys, "models")
    assert code == 2
    assert "TOKENMILL_CACHE_GB is 'much'" in err


def test_models_json(capsys):
    code, out, _ = run(capsys, "models", "--json")
    assert code == 0
    rows = json.loads(out)["models"]
    assert [row["name"] for row in rows] == list(ALIASES)
    assert all(row["path"] is None for row in rows)


def test_models_shows_what_is_on_disk(capsys, home):
    folder = home / "models" / "x"
    folder.mkdir(parents=True)
    (folder / "model.gguf").write_bytes(b"GGUF" * 1000)
    record = {"path": "model.gguf", "size_bytes": 4000, "mtime_ns": 0, "sha256": "0"}
    receipt = {
        "version": 1,
        "spec": "pypi:other==1",
        "name": "pypi:other==1",
        "kind": "gguf",
        "path": "model.gguf",
        "files": [record],
    }
    (folder / "receipt.json").write_text(json.dumps(receipt))
    _, out, _ = run(capsys, "models", "--json")
    row = json.loads(out)["models"][-1]
    assert (row["name"], row["size_bytes"]) == ("pypi:other==1", 4000)
    assert row["path"] == str(folder / "model.gguf")


def test_a_command_imports_no_library_that_it_may_not_need():
    script = (
        "import sys; sys.argv = ['tokenmill', 'run', ' ']\n"
        "from tokenmill.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    heavy = {"rich", "huggingface_hub", "filelock", "numpy", "gguf", "jinja2", "asyncio", "torch"}
    heavy |= {"platformdirs", "zipfile", "tempfile", "subprocess", "llvmlite", "tokenizers"}
    assert not heavy & set(done.stdout.split())

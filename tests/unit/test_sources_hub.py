"""Models from the Hub: the real client library against a server on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub

REPO = "org/tiny"
SAFETENSORS = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
    "model.safetensors": b"weights" * 1000,
    "consolidated.safetensors": b"the same in another layout",
    "pytorch_model.bin": b"\x80\x04.",
    "README.md": b"# tiny",
    "onnx/model.onnx": b"other",
}


USERS_OWN = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")


def pull(spec, endpoint, tmp_path, command="pull", **environment):
    return subprocess.run(
        [sys.executable, "-m", "tokenmill.cli", command, spec],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **{name: value for name, value in os.environ.items() if name not in USERS_OWN},
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "TOKENMILL_HOME": str(tmp_path / "home"),
            "NO_PROXY": "*",
            **environment,
        },
    )


def expect_error(done, text):
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert text in line


def test_safetensors_and_their_companions_are_fetched_and_nothing_else(tmp_path):
    hub = FakeHub(REPO, SAFETENSORS)
    with hub.serve() as endpoint:
        done = pull(f"hf:{REPO}", endpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == SAFETENSORS["model.safetensors"]


def test_the_second_start_needs_no_network(tmp_path):
    with FakeHub(REPO, SAFETENSORS).serve() as endpoint:
        first = pull(f"hf:{REPO}", endpoint, tmp_path)
    script = (
        "import sys; from tokenmill.models.sources import fetch;"
        f"print(fetch('hf:{REPO}').path); assert 'huggingface_hub' not in sys.modules"
    )
    second = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENMILL_HOME": str(tmp_path / "home")},
    )
    assert (second.returncode, second.stdout) == (0, first.stdout), second.stderr


def test_one_gguf_file_can_be_selected(tmp_path):
    files = {"a.gguf": b"GGUF a", "sub/b.gguf": b"GGUF b"}
    hub = FakeHub(REPO, files)
    with hub.serve() as endpoint:
        expect_done = pull(f"hf:{REPO}/sub/b.gguf@{COMMIT}", endpoint, tmp_path)
    assert expect_done.returncode == 0, expect_done.stderr
    assert Path(expect_done.stdout.strip()).read_bytes() == b"GGUF b"
    assert not any("a.gguf" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"pytorch_model.bin": b"x", "config.json": b"{}"}, "has pickled weights"),
        ({"README.md": b"x"}, "holds neither .safetensors nor .gguf"),
    ],
)
def test_repositories_without_usable_weights(tmp_path, files, text):
    with FakeHub(REPO, files).serve() as endpoint:
        done = pull(f"hf:{REPO}", endpoint, tmp_path)
    assert done.returncode == 1
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_choice_among_gguf_files_is_left_to_the_user(tmp_path):
    files = {"a.gguf": b"GGUF a", "b.gguf": b"GGUF b"}
    with FakeHub(REPO, files).serve() as endpoint:
        expect_error(pull(f"hf:{REPO}", endpoint, tmp_path), "name one of a.gguf, b.gguf")
        expect_error(pull(f"hf:{REPO}/c.gguf", endpoint, tmp_path), "has no file 'c.gguf'")


def test_a_wrong_checksum_is_found(tmp_path):
    hub = FakeHub(REPO, SAFETENSORS, lies={"model.safetensors": "0" * 64})
    with hub.serve() as endpoint:
        done = pull(f"hf:{REPO}", endpoint, tmp_path)
    assert done.returncode == 1
    assert "wrong checksum" in done.stderr
    assert not list(tmp_path.glob("home/models/*/receipt.json"))


@pytest.mark.parametrize(
    ("status", "error_code", "text"),
    [
        (404, "RepoNotFound", "the Hub has no repository org/tiny"),
        (404, "RevisionNotFound", "has no revision 'v1'"),
        (403, "GatedRepo", "is gated: accept its terms"),
        (500, "", "tried hf:org/tiny: the Hub cannot be reached"),
    ],
)
def test_refusals_of_the_hub_are_one_line(tmp_path, status, error_code, text):
    with FakeHub(REPO, {}, status=status, error_code=error_code).serve() as endpoint:
        expect_error(pull(f"hf:{REPO}@v1", endpoint, tmp_path), text)


def test_no_network(tmp_path):
    done = pull(f"hf:{REPO}", "http://127.0.0.1:9", tmp_path)
    expect_error(done, "tried hf:org/tiny: the Hub cannot be reached")


def test_offline_finds_what_another_program_fetched(tmp_path):
    with FakeHub(REPO, SAFETENSORS).serve() as endpoint:
        first = pull(f"hf:{REPO}", endpoint, tmp_path)
    for offline in ({"HF_HUB_OFFLINE": "1"}, {}):
        # refs/main is what other programs leave; a pull by commit does not write it.
        refs = tmp_path / "hf/hub/models--org--tiny/refs"
        refs.mkdir(exist_ok=True)
        (refs / "main").write_text(COMMIT)
        other_home = str(tmp_path / "other")
        done = pull(
            f"hf:{REPO}", "http://127.0.0.1:9", tmp_path, TOKENMILL_HOME=other_home, **offline
        )
        assert (done.returncode, done.stdout) == (0, first.stdout), done.stderr


def test_offline_without_the_model(tmp_path):
    done = pull(f"hf:{REPO}", "http://127.0.0.1:9", tmp_path, TOKENMILL_OFFLINE="1")
    expect_error(done, "the network is off")


OTHER = "beef" * 10


@pytest.mark.parametrize("revision", ["dev/next", "v1.0", OTHER, "refs/pr/1"])
def test_a_branch_a_tag_or_a_commit(tmp_path, revision):
    other = SAFETENSORS | {"model.safetensors": b"other weights"}
    names = dict.fromkeys(("dev/next", "v1.0", "refs/pr/1"), OTHER)
    hub = FakeHub(REPO, SAFETENSORS, revisions={OTHER: other}, names=names)
    with hub.serve() as endpoint:
        done = pull(f"hf:{REPO}@{revision}", endpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.name == OTHER
    assert (folder / "model.safetensors").read_bytes() == b"other weights"


def test_an_unknown_revision(tmp_path):
    with FakeHub(REPO, SAFETENSORS).serve() as endpoint:
        done = pull(f"hf:{REPO}@v9", endpoint, tmp_path)
    expect_error(done, "hf:org/tiny has no revision 'v9'")


def test_a_branch_that_moves_is_followed_by_pull_and_kept_without_network(tmp_path):
    hub = FakeHub(REPO, SAFETENSORS, names={"dev": COMMIT})
    with hub.serve() as endpoint:
        first = pull(f"hf:{REPO}@dev", endpoint, tmp_path)
        hub.revisions[OTHER] = SAFETENSORS
        hub.names["dev"] = OTHER
        second = pull(f"hf:{REPO}@dev", endpoint, tmp_path)
    third = pull(f"hf:{REPO}@dev", "http://127.0.0.1:9", tmp_path)
    assert [Path(done.stdout.strip()).name for done in (first, second)] == [COMMIT, OTHER]
    assert (third.returncode, third.stdout) == (0, second.stdout)
    assert "using what is on disk" in third.stderr


def test_a_private_repository_by_token(tmp_path):
    (tmp_path / "hf").mkdir()
    hub = FakeHub(REPO, SAFETENSORS, token="hf_secret")
    with hub.serve() as endpoint:
        expect_error(pull(f"hf:{REPO}", endpoint, tmp_path), "`hf auth login` or set HF_TOKEN")
        done = pull(f"hf:{REPO}", endpoint, tmp_path, HF_TOKEN="hf_secret")
        assert done.returncode == 0, done.stderr
        # what `hf auth login` leaves
        (tmp_path / "hf/token").write_text("hf_secret")
        done = pull(f"hf:{REPO}@{COMMIT}", endpoint, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused(tmp_path, status):
    with FakeHub(REPO, {}, status=status, error_code="Other").serve() as endpoint:
        done = pull(f"hf:{REPO}", endpoint, tmp_path, HF_TOKEN="hf_wrong")
    assert "HF_TOKEN" in done.stderr
    assert "hf_wrong" not in done.stderr
    expect_error(done, "hf:org/tiny" if status == 403 else "org/tiny")

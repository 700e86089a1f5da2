"""Models from ModelScope, against a server on this machine."""

import json
import os
import subprocess
import sys
import threading

import pytest
from fake_modelscope import FakeModelScope

from tokenmill.errors import (
    CapacityError,
    ModelFileError,
    ModelNotFoundError,
    TokenmillError,
    UnsupportedModelError,
    UsageError,
)
from tokenmill.models.progress import SilentProgress
from tokenmill.models.sources import fetch, http, parse_source
from tokenmill.models.sources.modelscope_api import ENDPOINT_SETTINGS, TOKEN_SETTING
from tokenmill.models.sources.shelf import make_shelf

REPO = "org/tiny"
SPEC = f"modelscope:{REPO}"
WEIGHTS = bytes(range(256)) * 2000
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"\x80\x04.",
    "README.md": b"# tiny",
    "receipt.json": b"theirs",
    "onnx/model.onnx": b"other",
}
FETCHED = ["config.json", "model.safetensors", "receipt.json", "tokenizer.json"]


class RecordingProgress(SilentProgress):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """A home of its own, nothing that the user has set, and no patience."""
    for name in ("TOKENMILL_OFFLINE", "HF_HUB_OFFLINE", *ENDPOINT_SETTINGS, TOKEN_SETTING):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TOKENMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(http, "PAUSES_S", (0.0, 0.0))


@pytest.fixture
def serve(monkeypatch):
    """Make a hub the one that the environment names."""
    servers = []

    def start(hub):
        servers.append(hub.serve())
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", servers[-1].__enter__())
        return hub

    yield start
    for server in servers:
        server.__exit__(None, None, None)


def tiny(**changes):
    return FakeModelScope(REPO, {"master": FILES}, **changes)


def partial_files(spec=SPEC):
    folder = make_shelf(parse_source(spec), None).partial
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def test_safetensors_and_their_companions_are_fetched_and_nothing_else(serve):
    hub = serve(tiny())
    model = fetch(SPEC)
    assert (model.name, model.kind) == (SPEC, "safetensors")
    assert sorted(path.name for path in model.path.iterdir()) == FETCHED
    assert (model.path / "model.safetensors").read_bytes() == WEIGHTS
    assert not make_shelf(parse_source(SPEC), None).partial.exists()
    asked = len(hub.requests)
    assert fetch(SPEC) == model
    assert len(hub.requests) == asked


def test_one_gguf_file_can_be_selected(serve):
    hub = FakeModelScope(REPO, {"v1": {"a.gguf": b"GGUF a", "sub/b.gguf": b"GGUF b"}})
    serve(hub)
    model = fetch(f"{SPEC}/sub/b.gguf@v1")
    assert (model.path.name, model.path.read_bytes()) == ("b.gguf", b"GGUF b")
    assert hub.downloads() == ["sub/b.gguf whole"]


def test_the_only_gguf_file_is_chosen(serve):
    serve(FakeModelScope(REPO, {"master": {"a.gguf": b"GGUF a", "README.md": b""}}))
    assert fetch(SPEC).path.read_bytes() == b"GGUF a"


@pytest.mark.parametrize("revision", ["dev", "v1.0", "c0ffee" + "0" * 34])
def test_a_branch_a_tag_or_a_commit(serve, revision):
    other = {"config.json": b"{}", "model.safetensors": b"of " + revision.encode()}
    serve(FakeModelScope(REPO, {"master": FILES, revision: other}))
    path = fetch(f"{SPEC}@{revision}").path
    assert (path / "model.safetensors").read_bytes() == other["model.safetensors"]
    assert fetch(SPEC).path != path


def test_a_repository_whose_first_branch_is_main(serve):
    serve(FakeModelScope(REPO, {"main": FILES}))
    assert (fetch(SPEC).path / "model.safetensors").read_bytes() == WEIGHTS


def test_an_unknown_revision_is_told_from_an_unknown_repository(serve):
    serve(FakeModelScope(REPO, {"master": FILES, "v1": FILES}, tags=("v1",)))
    with pytest.raises(ModelNotFoundError, match=r"no revision 'v2': it has master, v1$"):
        fetch(f"{SPEC}@v2")
    with pytest.raises(ModelNotFoundError, match=r"no modelscope:org/gone \(404: .*API_TOKEN"):
        fetch("modelscope:org/gone")


# -- resuming


def test_a_connection_that_breaks_is_made_again(serve):
    hub = serve(tiny(breaks=[1000, 50_000, 0]))
    assert (fetch(SPEC).path / "model.safetensors").read_bytes() == WEIGHTS
    last = len(WEIGHTS) - 1
    assert hub.downloads()[:4] == [
        "model.safetensors whole",
        f"model.safetensors bytes=1000-{last}",
        *[f"model.safetensors bytes=51000-{last}"] * 2,
    ]


def test_what_is_on_disk_is_not_fetched_again(serve):
    hub = serve(tiny(breaks=[300_000, 0, 0]))
    with pytest.raises(ModelNotFoundError, match="the connection ended early"):
        fetch(SPEC)
    assert 300_000 in partial_files().values()
    hub.requests.clear()
    assert (fetch(SPEC).path / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.downloads()[0] == f"model.safetensors bytes=300000-{len(WEIGHTS) - 1}"


def test_a_server_without_ranges_is_read_from_the_beginning(serve):
    serve(tiny(breaks=[300_000], knows_ranges=False))
    assert (fetch(SPEC).path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_branch_that_moved_is_not_continued(serve):
    hub = serve(tiny(breaks=[300_000, 0, 0]))
    with pytest.raises(ModelNotFoundError):
        fetch(SPEC)
    hub.requests.clear()
    hub.revisions["master"] = FILES | {"model.safetensors": b"new" * 200_000}
    assert (fetch(SPEC).path / "model.safetensors").read_bytes() == b"new" * 200_000
    assert hub.downloads()[0] == "model.safetensors whole"


def test_without_checksums_only_a_connection_is_continued(serve):
    hub = serve(tiny(breaks=[300_000, 0, 0], has_checksums=False))
    with pytest.raises(ModelNotFoundError):
        fetch(SPEC)
    hub.requests.clear()
    hub.breaks = [300_000]
    hub.revisions["master"] = FILES | {"model.safetensors": WEIGHTS[::-1]}
    assert (fetch(SPEC).path / "model.safetensors").read_bytes() == WEIGHTS[::-1]
    assert [name.split()[1][:5] for name in hub.downloads()[:2]] == ["whole", "bytes"]


def test_refresh_fetches_only_what_has_changed(serve):
    hub = serve(tiny())
    fetch(SPEC)
    hub.requests.clear()
    hub.revisions["master"] = FILES | {"config.json": b'{"new": 1}'}
    path = fetch(SPEC, refresh=True).path
    assert hub.downloads() == ["config.json whole"]
    assert (path / "config.json").read_bytes() == b'{"new": 1}'
    assert (path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_damaged_model_is_fetched_again(serve):
    hub, progress = serve(tiny()), RecordingProgress()
    path = fetch(SPEC).path
    (path / "model.safetensors").write_bytes(b"damaged")
    hub.requests.clear()
    assert (fetch(SPEC, progress=progress).path / "model.safetensors").read_bytes() == WEIGHTS
    assert "fetching it again" in progress.notes[0]


def test_refresh_without_network_serves_what_is_on_disk(serve, monkeypatch):
    serve(tiny())
    model, progress = fetch(SPEC), RecordingProgress()
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    assert fetch(SPEC, refresh=True, progress=progress) == model
    [note] = progress.notes
    assert note.endswith("using what is on disk")


def test_two_that_want_the_same_fetch_it_once(serve):
    hub, found = serve(tiny()), []
    threads = [threading.Thread(target=lambda: found.append(fetch(SPEC))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(hub.downloads()) == 3


# -- checksums and what a server may send


def test_a_wrong_checksum_is_thrown_away(serve):
    hub = serve(tiny(lies={"model.safetensors": "0" * 64}))
    with pytest.raises(ModelFileError, match=r"model.safetensors of .* wrong checksum .* again"):
        fetch(SPEC)
    assert all(size < 1000 for size in partial_files().values())
    hub.lies.clear()
    assert (fetch(SPEC).path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_hub_that_tells_no_checksums(serve):
    serve(tiny(has_checksums=False))
    assert (fetch(SPEC).path / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>",
        b"[" * 100_000,
        b"[]",
        b"{}",
        b'{"Data": null}',
        b'{"Data": {"Files": [1]}}',
        b'{"Data": {"Files": [{"Type": "blob", "Path": 1, "Size": 1}]}}',
        b'{"Data": {"Files": [{"Type": "blob", "Path": "a", "Size": -1}]}}',
        b'{"Data": {"Files": [{"Type": "blob", "Path": "a", "Size": true}]}}',
        b'{"Data": {"Files": [{"Type": "blob", "Path": "a", "Size": 1, "Sha256": "../x"}]}}',
        b'{"Data": {"Files": [{"Type": "blob", "Path": "a", "Size": 1, "Sha256": 5}]}}',
        b'{"Data": {}, "Code": 500, "Success": false, "Message": "oh\\nno"}',
    ],
)
def test_answers_that_make_no_sense(serve, data):
    serve(tiny(body=data))
    with pytest.raises(ModelNotFoundError, match=r"tried modelscope:org/tiny.*MODELSCOPE_ENDPOINT"):
        fetch(SPEC)


def test_names_that_lead_elsewhere_stay_in_the_shelf(serve, tmp_path):
    files = {"../config.json": b"{}", "/model.safetensors": b"x", "..": b"x"}
    entries = [{"Type": "blob", "Path": name, "Size": 1} for name in files]
    serve(tiny(body=json.dumps({"Data": {"Files": entries}}).encode()))
    with pytest.raises(UnsupportedModelError, match="neither"):
        fetch(SPEC)


def test_an_absurd_size_is_refused_before_the_download(serve):
    size = 1 << 60
    entries = [{"Type": "blob", "Path": "a.gguf", "Size": size}]
    serve(tiny(body=json.dumps({"Data": {"Files": entries}}).encode()))
    with pytest.raises(CapacityError, match=r"are needed.*TOKENMILL_HOME"):
        fetch(SPEC)


@pytest.mark.parametrize(
    ("files", "error", "text"),
    [
        ({"pytorch_model.bin": b"x", "config.json": b"{}"}, UnsupportedModelError, "pickled"),
        ({"README.md": b"x"}, UnsupportedModelError, "holds neither .safetensors nor .gguf"),
        ({"model.safetensors": b"x"}, ModelFileError, "no config.json"),
        ({"a.gguf": b"GGUF", "b.gguf": b"GGUF"}, UsageError, "name one of a.gguf, b.gguf"),
        ({"a.gguf": b"elf"}, ModelFileError, "is not a GGUF file"),
    ],
)
def test_repositories_without_usable_weights(serve, files, error, text):
    serve(FakeModelScope(REPO, {"master": files}))
    with pytest.raises(error, match=text):
        fetch(SPEC)


def test_a_file_that_is_not_there(serve):
    serve(tiny())
    with pytest.raises(ModelNotFoundError, match=r"modelscope:org/tiny has no file 'c\.gguf'"):
        fetch(f"{SPEC}/c.gguf")


# -- tokens and addresses


def test_a_private_repository_by_token(serve, monkeypatch):
    serve(tiny(token="ms-secret"))
    with pytest.raises(ModelNotFoundError, match=r"refuses .*set MODELSCOPE_API_TOKEN to a token"):
        fetch(SPEC)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-wrong")
    with pytest.raises(ModelNotFoundError, match="to another token") as caught:
        fetch(SPEC)
    assert "ms-wrong" not in str(caught.value)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", " ms-secret\n")
    assert (fetch(SPEC).path / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("token", ["two words", "a\r\nHost: x", "semi;colon", "schlüssel"])
def test_a_token_that_is_none(serve, monkeypatch, token):
    serve(tiny())
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", token)
    with pytest.raises(UsageError, match="MODELSCOPE_API_TOKEN holds characters") as caught:
        fetch(SPEC)
    assert token not in str(caught.value)


def test_the_token_is_not_shown_to_another_host(serve, monkeypatch):
    storage = FakeModelScope(REPO, {"master": FILES})
    with storage.serve() as elsewhere:
        hub = serve(tiny(token="ms-secret", redirect=elsewhere))
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret")
        assert (fetch(SPEC).path / "model.safetensors").read_bytes() == WEIGHTS
    assert set(hub.secrets_seen) == {"Bearer ms-secret"}
    assert set(storage.secrets_seen) == {None}


def test_the_token_goes_along_within_the_host(serve, monkeypatch):
    hub = serve(tiny(token="ms-secret"))
    hub.redirect = os.environ["MODELSCOPE_ENDPOINT"]
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret")
    assert (fetch(SPEC).path / "model.safetensors").read_bytes() == WEIGHTS
    assert len(hub.downloads()) == 2 * 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble(serve, status):
    serve(tiny(status=status))
    with pytest.raises(ModelNotFoundError, match=rf"tried .*cannot be used \({status}"):
        fetch(SPEC)


@pytest.mark.parametrize("text", ["file:///etc", "ftp://host", "http://", "https://[", "ho st"])
def test_an_endpoint_that_is_no_address(monkeypatch, text):
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", text)
    with pytest.raises(UsageError, match=r"MODELSCOPE_ENDPOINT is .*must be an address"):
        fetch(SPEC)


def test_a_bare_domain_is_taken_as_its_own_library_does(serve, monkeypatch):
    serve(tiny())
    endpoint = os.environ["MODELSCOPE_ENDPOINT"]
    monkeypatch.delenv("MODELSCOPE_ENDPOINT")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", endpoint + "/")
    assert fetch(SPEC).name == SPEC


def test_offline(monkeypatch):
    monkeypatch.setenv("TOKENMILL_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="network is off"):
        fetch(SPEC)


def test_the_command_says_one_line(serve):
    serve(tiny(status=500))
    done = subprocess.run(
        [sys.executable, "-m", "tokenmill.cli", "pull", SPEC],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: tried modelscope:org/tiny: http://127.0.0.1:")


def test_every_refusal_is_one_line(serve):
    serve(tiny(body=b'{"Data": {}, "Success": false, "Message": "a\\nb"}'))
    with pytest.raises(TokenmillError) as caught:
        fetch(SPEC)
    assert "\n" not in str(caught.value)

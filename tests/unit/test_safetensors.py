"""The safetensors reader: sound folders, sharded or not; damaged and hostile ones refused."""

import itertools
import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import hf_name, random_floats, random_weights, write_hf_folder
from safetensors.numpy import save_file

from tokenmill.errors import (
    ModelFileError,
    ModelNotFoundError,
    TokenmillError,
    UnsupportedModelError,
)
from tokenmill.models.safetensors import read_safetensors
from tokenmill.models.sources.local import INDEX, choose_safetensors


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_read_as_written(shards: int, tmp_path: Path) -> None:
    weights = random_weights()
    tensors = read_safetensors(write_hf_folder(tmp_path, weights, shards))
    assert set(tensors) == set(map(hf_name, weights))
    for name, weight in weights.items():
        read = tensors[hf_name(name)].read(name)
        assert read.info.shape == weight.shape
        np.testing.assert_array_equal(read.data.view("<f4").reshape(weight.shape), weight)


@pytest.mark.parametrize(
    ("dtype", "encoding"),
    [(np.float32, "F32"), (np.float16, "F16"), (ml_dtypes.bfloat16, "BF16"), (np.int64, "I64")],
)
def test_encodings_are_named(dtype: type, encoding: str, tmp_path: Path) -> None:
    save_file({"a": random_floats(3, 5).astype(dtype)}, tmp_path / "weights.safetensors")
    info = read_safetensors(tmp_path)["a"].info
    assert (info.encoding, info.shape) == (encoding, (3, 5))
    assert info.size_bytes == 15 * np.dtype(dtype).itemsize


def _entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes


def _file(header: object, data: bytes = bytes(24), header_len: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if header_len is None else header_len) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        _file({"a": _entry()}, header_len=2**60),
        _file([]),
        _file({"a": _entry()}, data=bytes(23)),
        _file({"a": _entry()}, data=bytes(25)),
        _file({"a": _entry(shape=[2**62, 2**62])}),
        _file({"a": _entry(data_offsets=[0, 2**60])}),
        _file({"a": _entry(data_offsets=[24, 0])}),
        _file({"a": _entry(), "b": _entry()}),
        _file({"a": _entry(dtype="F99")}),
        _file({"a\nb": _entry(), "a\nc": _entry()}),
    ],
)
def test_damaged_file_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        read_safetensors(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def _reindex(folder: Path, change: dict[str, object]) -> Path:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= change
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/etc/passwd", "/a.safetensors", "sub/x.safetensors", "..", 7],
)
def test_index_cannot_lead_outside_its_folder(shard: object, tmp_path: Path) -> None:
    folder = _reindex(write_hf_folder(tmp_path / "m", random_weights(), 2), {"x": shard})
    save_file({"x": random_floats(2)}, tmp_path / "secret.safetensors")
    with pytest.raises(ModelFileError, match=r"does not name a \.safetensors file beside it"):
        read_safetensors(folder)


def test_missing_shard_and_tensor_in_no_shard(tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path, random_weights(), 2)
    _reindex(folder, {"ghost": "model-00001-of-00002.safetensors"})
    with pytest.raises(ModelFileError, match=r"model-00001-of-00002\.safetensors: lacks 'ghost'"):
        read_safetensors(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ModelNotFoundError, match=r"model-00002-of-00002\.safetensors: no such file"
    ):
        read_safetensors(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', "[" * 100_000])
def test_index_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ModelFileError, match=INDEX):
        read_safetensors(tmp_path)


def test_folder_without_safetensors_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no \.safetensors"):
        read_safetensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match="pickled weights only"):
        read_safetensors(tmp_path)
    for name in "ab":
        save_file({"a": random_floats(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelFileError, match=r"2 \.safetensors files but no"):
        read_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("model", "extra"), ["model"]),
        (("model", "model.fp16"), ["model"]),
        (("model-fp16", "extra"), ["model-fp16"]),
        (("weights",), ["weights"]),
    ],
)
def test_what_is_fetched_is_what_is_read(
    names: tuple[str, ...], chosen: list[str], tmp_path: Path
) -> None:
    files = [f"{name}.safetensors" for name in names]
    for number, file in enumerate(files):
        save_file({f"tensor{number}": random_floats(2)}, tmp_path / file)
    assert choose_safetensors(files) == [f"{name}.safetensors" for name in chosen]
    assert list(read_safetensors(tmp_path)) == ["tensor0"]


_SOUND = _file({"a": _entry(), "b": _entry(data_offsets=[24, 48])}, bytes(48))
_counter = itertools.count()


@given(
    changes=st.lists(st.tuples(st.integers(0, len(_SOUND) - 1), st.integers(0, 255)), max_size=4),
    end=st.one_of(st.just(len(_SOUND)), st.integers(0, len(_SOUND))),
)
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damage_raises_readable_errors_only(
    changes: list[tuple[int, int]], end: int, tmp_path: Path
) -> None:
    content = bytearray(_SOUND)
    for at, value in changes:
        content[at] = value
    folder = tmp_path / str(next(_counter))
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(content[:end])
    try:
        tensors = read_safetensors(folder)
    except TokenmillError:
        return
    for name, tensor in tensors.items():
        assert tensor.read(name).data.nbytes == tensor.info.size_bytes

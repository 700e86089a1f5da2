"""The GGUF reader: agrees with the `gguf` package on sound files, refuses all others by name."""

import itertools
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import (
    canonical_shapes,
    gguf_bytes,
    gguf_string,
    gguf_tensor,
    gguf_u32,
    random_floats,
    random_weights,
    write_gguf,
)

from tokenmill.errors import (
    ModelFileError,
    ModelNotFoundError,
    TokenmillError,
    UnsupportedModelError,
)
from tokenmill.models.checkpoint import open_checkpoint
from tokenmill.models.gguf.reader import read_gguf
from tokenmill.models.weights import load_weights


def test_metadata_and_tensors_are_those_that_the_gguf_package_reads(tmp_path: Path) -> None:
    changes = {"x.flag": True, "x.negative": [-1, 2], "x.flags": [True, False], "x.text": "a\nb é"}
    path = write_gguf(tmp_path / "m.gguf", random_weights(), changes=changes)
    file, oracle = read_gguf(path), GGUFReader(path)
    expected = {k: f.contents() for k, f in oracle.fields.items() if not k.startswith("GGUF.")}
    assert dict(file.metadata) == expected
    assert len(file.tensors) == len(oracle.tensors)
    for tensor in oracle.tensors:
        read = file.tensors[tensor.name].read("x")
        assert read.info.shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(read.data.reshape(-1), tensor.data.view(np.uint8).reshape(-1))


def test_array_of_strings_is_not_decoded_before_it_is_asked_for(tmp_path: Path) -> None:
    tokens = (
        gguf_string("t") + struct.pack("<IIQ", 9, 8, 2) + gguf_string("a") + gguf_string(b"\xff")
    )
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes([tokens, gguf_u32("n", 7)]))
    metadata = read_gguf(path).metadata
    assert metadata["n"] == 7
    with pytest.raises(ModelFileError, match=r"m\.gguf: metadata t\[1\] is not UTF-8"):
        metadata["t"]


F32_DATA = bytes(32)
HUGE = 2**60

FORGED = {
    "empty": (b"", "is empty"),
    "magic": (b"GGML" + bytes(20), "does not begin with 'GGUF'"),
    "only the magic": (b"GGUF", "version needs 4 bytes"),
    "metadata count": (gguf_bytes(num_metadata=HUGE), "number of metadata values is"),
    "metadata count beyond the file": (gguf_bytes(num_metadata=9), "the file ends"),
    "tensor count": (gguf_bytes(num_tensors=HUGE), "number of tensors is"),
    "tensor count beyond the file": (gguf_bytes(num_tensors=9), "the file ends"),
    "key length": (gguf_bytes([struct.pack("<Q", HUGE)]), "length of a metadata key"),
    "key with newline": (gguf_bytes([gguf_u32("a\nb", 1)]), "control characters"),
    "key not UTF-8": (gguf_bytes([gguf_string(b"\xff") + struct.pack("<IB", 99, 0)]), "xff"),
    "key twice": (gguf_bytes([gguf_u32("a", 1)] * 2), "metadata a occurs twice"),
    "value type": (gguf_bytes([gguf_string("a") + struct.pack("<IQ", 99, 0)]), "unknown type 99"),
    "string length": (gguf_bytes([gguf_string("a") + struct.pack("<IQ", 8, HUGE)]), "past the end"),
    "array length": (
        gguf_bytes([gguf_string("a") + struct.pack("<IIQ", 9, 4, HUGE)]),
        "length of metadata a is",
    ),
    "array beyond the file": (
        gguf_bytes([gguf_string("a") + struct.pack("<IIQ", 9, 12, 2**20)]),
        "needs 8388608 bytes",
    ),
    "string array beyond the file": (
        gguf_bytes([gguf_string("a") + struct.pack("<IIQ", 9, 8, 2**20)]),
        "past the end",
    ),
    "array of arrays": (
        gguf_bytes([gguf_string("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(99)]),
        "array of arrays",
    ),
    "alignment": (gguf_bytes([gguf_u32("general.alignment", 24)]), "not a power of two"),
    "alignment zero": (gguf_bytes([gguf_u32("general.alignment", 0)]), "not a power of two"),
    "tensor twice": (gguf_bytes(tensors=[gguf_tensor("a")] * 2, data=F32_DATA), "a occurs twice"),
    "dimensions": (gguf_bytes(tensors=[gguf_tensor("a", [1] * 5)]), "number of dimensions"),
    "no dimension": (gguf_bytes(tensors=[gguf_tensor("a", [])]), r"has shape \[\]"),
    "zero size": (gguf_bytes(tensors=[gguf_tensor("a", [0])]), r"has shape \[0\]"),
    "size": (gguf_bytes(tensors=[gguf_tensor("a", [HUGE, HUGE])]), "larger than the file"),
    "row of part of a block": (
        gguf_bytes(tensors=[gguf_tensor("a", [33], type_id=8)], data=bytes(99)),
        "do not divide into Q8_0 blocks",
    ),
    "offset beyond the file": (
        gguf_bytes(tensors=[gguf_tensor("a", offset=2**40)], data=F32_DATA),
        "beyond the file",
    ),
    "offset not aligned": (
        gguf_bytes(tensors=[gguf_tensor("a", offset=4)], data=bytes(64)),
        "not aligned to 32",
    ),
    "overlap": (
        gguf_bytes(tensors=[gguf_tensor("a", [16]), gguf_tensor("b", offset=32)], data=bytes(64)),
        "tensor b overlaps",
    ),
    "truncated data": (gguf_bytes(tensors=[gguf_tensor("a")], data=bytes(31)), "truncated"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, message = FORGED[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message) as caught:
        read_gguf(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF" + struct.pack("<I", 1) + bytes(20), "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(20), "big-endian"),
        (gguf_bytes(tensors=[gguf_tensor("a", type_id=4711)]), "tensor a is of unknown type 4711"),
    ],
)
def test_other_versions_and_types_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=f"{message}.*supported"):
        read_gguf(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file"):
        read_gguf(tmp_path / "m.gguf")


def test_parts_of_a_split_file_are_read_as_one(tmp_path: Path) -> None:
    parts = [
        gguf_bytes([gguf_u32("split.count", 2)], [gguf_tensor("a")], random_floats(8).tobytes()),
        gguf_bytes([], [gguf_tensor("b")], random_floats(8, seed=1).tobytes()),
    ]
    for i, content in enumerate(parts, 1):
        (tmp_path / f"m-{i:05}-of-00002.gguf").write_bytes(content)
    file = read_gguf(tmp_path / "m-00001-of-00002.gguf")
    values = [file.tensors[name].read(name).data.view("<f4") for name in "ab"]
    np.testing.assert_array_equal(
        np.concatenate(values), [random_floats(8), random_floats(8, seed=1)]
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m-00002-of-00002.gguf", "not the first part.*give m-00001-of-00002.gguf"),
        ("m-00001-of-00000.gguf", "not the first part"),
        ("m.gguf", "one part of several"),
        ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf: no such file"),
    ],
)
def test_wrong_parts_of_a_split_file(name: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(gguf_bytes([gguf_u32("split.count", 2)]))
    with pytest.raises(TokenmillError, match=message):
        read_gguf(path)


def test_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    for i in (1, 2):
        content = gguf_bytes(tensors=[gguf_tensor("a")], data=F32_DATA)
        (tmp_path / f"m-{i:05}-of-00002.gguf").write_bytes(content)
    with pytest.raises(ModelFileError, match="tensor a is in an earlier part too"):
        read_gguf(tmp_path / "m-00001-of-00002.gguf")


def _read_everything(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.tokenizer_metadata is not None
    dict(checkpoint.tokenizer_metadata)
    for _ in load_weights(checkpoint, canonical_shapes()):
        pass


@pytest.fixture(scope="module")
def sound_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", random_weights())
    _read_everything(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def fresh_paths(tmp_path_factory: pytest.TempPathFactory) -> "itertools.count[int]":
    return itertools.count()


_HEADER_BYTES = 1920
_EXTREMES = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**64 - 1])


@given(data=st.data())
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_damage_raises_readable_errors_only(
    data: st.DataObject,
    sound_bytes: bytes,
    fresh_paths: "itertools.count[int]",
    tmp_path: Path,
) -> None:
    content = bytearray(sound_bytes)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, _HEADER_BYTES))
        if data.draw(st.booleans()):
            content[at : at + 8] = struct.pack("<Q", data.draw(_EXTREMES))
        else:
            content[at] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path = tmp_path / f"{next(fresh_paths)}.gguf"  # never over a file that is still mapped
    path.write_bytes(content[:end])
    error, peak_bytes = _outcome(path)
    path.unlink()
    assert str(path) in error
    assert "\n" not in error
    assert peak_bytes < 2**24


def _outcome(path: Path) -> tuple[str, int]:
    """What reading everything says (the path alone if nothing is wrong), and memory at its peak."""
    tracemalloc.start()
    try:
        _read_everything(path)
    except TokenmillError as error:
        return str(error), tracemalloc.get_traced_memory()[1]
    else:
        return str(path), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

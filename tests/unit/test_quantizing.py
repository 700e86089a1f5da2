"""Quantised GGUF files: what they hold, read by the gguf package and by ourselves."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, quants
from model_files import canonical_shapes, random_weights, write_gguf

from tokenmill.cli.main import main
from tokenmill.errors import ModelNotFoundError, UsageError
from tokenmill.ir.formats import quantize
from tokenmill.models.checkpoint import open_checkpoint
from tokenmill.models.encode import ENCODERS, encode
from tokenmill.models.quantizing import quantize_model
from tokenmill.models.weights import load_weights


def relative(difference: np.ndarray, values: np.ndarray) -> float:
    return float(np.linalg.norm(difference) / np.linalg.norm(values))


@pytest.mark.parametrize("format_name", ENCODERS)
def test_blocks_are_ggml_s(format_name: str) -> None:
    values = np.random.default_rng(0).standard_normal((7, 512), np.float32)
    weight = quantize(values, format_name)
    kind = quants.GGMLQuantizationType[ENCODERS[format_name].encoding]
    found = quants.dequantize(encode(weight), kind)
    np.testing.assert_array_equal(found, weight.dequantize())


@pytest.mark.parametrize("format_name", ENCODERS)
def test_blocks_are_read_as_they_were_written(format_name: str) -> None:
    weight = quantize(np.random.default_rng(1).standard_normal((5, 256), np.float32), format_name)
    layout = ENCODERS[format_name].layout
    found = layout.unpack(encode(weight).reshape(5, -1, layout.block_bytes))
    assert found.format == format_name
    np.testing.assert_array_equal(found.quants, weight.quants)
    for name, plane in weight.planes().items():
        np.testing.assert_array_equal(found.planes()[name], plane)


@pytest.mark.parametrize(("format_name", "most"), [("q8", 0.01), ("q4", 0.1)])
def test_a_file_keeps_all_but_its_matrices(tmp_path: Path, format_name: str, most: float) -> None:
    weights = random_weights()
    source = write_gguf(tmp_path / "model.gguf", weights)
    target = tmp_path / "small.gguf"
    made = quantize_model(source, target, format_name)
    assert 0 < made.relative_error < most
    assert made.target_bytes < made.source_bytes / 2
    old, new = GGUFReader(source), GGUFReader(target)
    changed = {"general.file_type", "general.quantization_version"}
    for name, field in old.fields.items():
        if not name.startswith("GGUF.") and name not in changed:
            assert new.fields[name].contents() == field.contents(), name
    assert [t.name for t in new.tensors] == [t.name for t in old.tensors]
    types = {t.name: t.tensor_type.name for t in new.tensors}
    assert types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.ffn_up.weight"] == {"q8": "Q8_0", "q4": "Q4_1"}[format_name]
    assert types["blk.0.attn_norm.weight"] == "F32"


def test_we_read_exactly_what_we_wrote(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", random_weights())
    quantize_model(source, tmp_path / "small.gguf", "q4")
    shapes = canonical_shapes()
    rounded = load_weights(open_checkpoint(source), shapes, "q4")
    kept = load_weights(open_checkpoint(tmp_path / "small.gguf"), shapes)
    for ours, theirs in zip(rounded, kept, strict=True):
        assert theirs.relative_error == 0
        np.testing.assert_array_equal(theirs.weight.dequantize(), ours.weight.dequantize())


@pytest.mark.parametrize(
    ("format_name", "taken", "embedding"),
    [("q4_k", "Q4_1", "Q8_0"), ("q5_k", "Q8_0", "Q8_0"), ("q6_k", "Q8_0", "Q8_0")],
)
def test_rows_that_are_not_whole_blocks_get_a_format_of_smaller_ones(
    tmp_path: Path, format_name: str, taken: str, embedding: str
) -> None:
    source = write_gguf(tmp_path / "model.gguf", random_weights())
    quantize_model(source, tmp_path / "small.gguf", format_name)
    types = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "small.gguf").tensors}
    assert (types["blk.0.ffn_up.weight"], types["token_embd.weight"]) == (taken, embedding)


def test_whole_blocks_get_the_format_and_the_embedding_8_bits(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    rng = np.random.default_rng(0)
    for name in ("token_embd.weight", "blk.0.ffn_up.weight"):
        writer.add_tensor(name, rng.standard_normal((8, 512), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for format_name in ("q4_k", "q5_k", "q6_k"):
        target = tmp_path / f"{format_name}.gguf"
        made = quantize_model(tmp_path / "model.gguf", target, format_name)
        up = GGUFReader(target).get_tensor(1)
        assert up.tensor_type.name == format_name.upper()
        values = quants.dequantize(up.data, up.tensor_type)
        source = GGUFReader(tmp_path / "model.gguf").get_tensor(1).data
        assert 0 < relative(values - source, source) < 0.08
        assert made.target_bytes < made.source_bytes / 2


def test_a_file_that_exists_is_not_touched(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", random_weights())
    with pytest.raises(UsageError, match="exists already"):
        quantize_model(source, source, "q4")
    with pytest.raises(UsageError, match="is no folder"):
        quantize_model(source, tmp_path / "none" / "x.gguf", "q4")


def test_what_is_small_already_is_not_written_again(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", random_weights())
    quantize_model(source, tmp_path / "small.gguf", "q4")
    with pytest.raises(UsageError, match="no matrix would become smaller as q8"):
        quantize_model(tmp_path / "small.gguf", tmp_path / "again.gguf", "q8")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no \.safetensors and no \.gguf file"):
        quantize_model(tmp_path, tmp_path / "x.gguf", "q4")


def test_the_command_prints_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_gguf(tmp_path / "model.gguf", random_weights())
    with pytest.raises(SystemExit) as exited:
        main(["quantize", str(source), str(tmp_path / "small.gguf"), "--format", "q8"])
    out, err = capsys.readouterr()
    assert (exited.value.code, out) == (0, f"{tmp_path / 'small.gguf'}\n")
    assert "matrices became q8: relative error up to" in err
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".gguf") == [
        "model.gguf",
        "small.gguf",
    ]

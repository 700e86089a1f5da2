"""Decoding of weights: against `gguf.quants`, and through whole checkpoints."""

import json
import struct
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from model_files import canonical_shapes, random_weights, write_gguf, write_hf_folder

from tokenmill.config import QUANTIZATIONS
from tokenmill.errors import (
    ModelFileError,
    ModelNotFoundError,
    UnsupportedModelError,
    UsageError,
)
from tokenmill.models import weights as weights_module
from tokenmill.models.checkpoint import Checkpoint, fingerprint_model, open_checkpoint
from tokenmill.models.encodings import QUANT_ENCODINGS, REQUANTIZED_ENCODINGS
from tokenmill.models.mapped import EncodedTensor, TensorInfo
from tokenmill.models.progress import SilentProgress
from tokenmill.models.weights import LoadedWeight, decode, load_weights

EXACT = {
    "Q4_0": "q4_0",
    "Q4_1": "q4",
    "Q5_0": "q8",
    "Q8_0": "q8",
    "Q4_K": "q4_k",
    "Q5_K": "q5_k",
    "Q6_K": "q6_k",
}
ROUNDED = {"Q4_K": ("q4", 0.03), "Q5_K": ("q8", 0.01), "Q6_K": ("q8", 0.01)}


def random_blocks(encoding: str, n: int, k: int) -> EncodedTensor:
    """Random bytes as a tensor; without one exponent bit, so that each float16 is finite."""
    block_len, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]
    shape = (n, k // block_len * block_bytes)
    data = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8) & np.uint8(0xBF)
    if encoding == "MXFP4":
        data[:, ::block_bytes] = 120  # exponents, which would span more than float16 holds
    info = TensorInfo(shape=(n, k), encoding=encoding, size_bytes=data.size)
    return EncodedTensor(name="t", info=info, data=data)


def floats(values: np.ndarray, dtype: type) -> EncodedTensor:
    encoding = {np.float32: "F32", np.float16: "F16", ml_dtypes.bfloat16: "BF16"}[dtype]
    data = values.astype(dtype).view(np.uint8)
    info = TensorInfo(shape=values.shape, encoding=encoding, size_bytes=data.size)
    return EncodedTensor(name="t", info=info, data=data)


def oracle(tensor: EncodedTensor) -> np.ndarray:
    return quants.dequantize(tensor.data, GGMLQuantizationType[tensor.info.encoding])


def relative(difference: np.ndarray, values: np.ndarray) -> float:
    return float(np.linalg.norm(difference) / np.linalg.norm(values))


@pytest.mark.parametrize("encoding", EXACT)
@pytest.mark.parametrize("chunk_len", [1, 700, 2**17])
def test_exact_encodings(encoding: str, chunk_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "_CHUNK_LEN", chunk_len)
    tensor = random_blocks(encoding, 7, 512)
    weight, error = decode(tensor, EXACT[encoding])
    assert (weight.format, error) == (EXACT[encoding], 0.0)
    np.testing.assert_array_equal(weight.dequantize(), oracle(tensor))


@pytest.mark.parametrize("encoding", EXACT)
def test_unpacking_rounds_nothing(encoding: str) -> None:
    tensor = random_blocks(encoding, 7, 512)
    row = QUANT_ENCODINGS[encoding]
    assert (row.block_len, row.block_bytes) == GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]
    unpacked = row.unpack(tensor.data.reshape(7, -1, row.block_bytes))
    np.testing.assert_array_equal(unpacked.dequantize(), oracle(tensor))
    weight, error = decode(tensor, "f32")
    np.testing.assert_array_equal(weight.dequantize(), oracle(tensor))
    assert error == 0.0


@pytest.mark.parametrize("encoding", ROUNDED)
def test_encodings_rounded_to_another_format_report_their_error(encoding: str) -> None:
    tensor = random_blocks(encoding, 50, 512)
    format_name, most = ROUNDED[encoding]
    weight, error = decode(tensor, format_name)
    values = oracle(tensor)
    assert 0 < error < most
    assert error == pytest.approx(relative(weight.dequantize() - values, values), rel=1e-3)


@pytest.mark.parametrize("encoding", REQUANTIZED_ENCODINGS)
def test_encodings_without_a_decoder_of_ours_are_rounded(encoding: str) -> None:
    tensor = random_blocks(encoding, 4, 512)
    weight, error = decode(tensor, "q8")
    values = oracle(tensor)
    assert error == pytest.approx(relative(weight.dequantize() - values, values), rel=1e-3)
    assert error < 0.02


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_floats(dtype: type) -> None:
    values = np.random.default_rng(0).standard_normal((5, 100)).astype(dtype).astype(np.float32)
    weight, error = decode(floats(values, dtype), "bf16")
    np.testing.assert_array_equal(weight.quants, values.astype(ml_dtypes.bfloat16))
    assert error == (0.0 if dtype is ml_dtypes.bfloat16 else pytest.approx(0.0017, rel=0.2))
    exact, error = decode(floats(values, dtype), "f32")
    np.testing.assert_array_equal(exact.quants, values)
    assert error == 0.0


def test_error_of_very_large_weights_is_finite() -> None:
    values = np.random.default_rng(0).standard_normal((5, 100)).astype(np.float32) * 1e25
    assert decode(floats(values, np.float32), "bf16")[1] == pytest.approx(0.0017, rel=0.2)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format_name", ["q4", "q8", "bf16", "f32"])
def test_weight_that_is_not_finite_is_refused(dtype: type, value: float, format_name: str) -> None:
    values = np.ones((3, 64), np.float32)
    values[1, 33] = value
    with pytest.raises(ModelFileError, match="tensor t holds weights that are infinite or not a"):
        decode(floats(values, dtype), format_name)


@pytest.mark.parametrize("encoding", EXACT)
def test_scale_that_is_not_finite_is_refused(encoding: str) -> None:
    tensor = random_blocks(encoding, 3, 512)
    at = 208 if encoding == "Q6_K" else 0
    tensor.data[1, at : at + 2] = np.frombuffer(struct.pack("<e", np.nan), np.uint8)
    with pytest.raises(ModelFileError, match="infinite or not a number"):
        decode(tensor, "q8")


def test_weight_beyond_the_range_of_a_format_is_refused() -> None:
    values = np.ones((3, 64), np.float32) * 1e30
    with pytest.raises(ModelFileError, match="too large for q8; use --quantization bf16"):
        decode(floats(values, np.float32), "q8")
    assert decode(floats(values, np.float32), "bf16")[0].format == "bf16"


def test_temporaries_are_a_fraction_of_a_large_tensor() -> None:
    tensor = random_blocks("Q6_K", 4096, 2048)
    decode(random_blocks("Q6_K", 1, 256), "q8")
    tracemalloc.start()
    weight, _ = decode(tensor, "q8")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1.0625 * weight.quants.nbytes + 2**23


def load(checkpoint: Checkpoint, quantization: str = "auto") -> dict[str, LoadedWeight]:
    has_bias = checkpoint.config.has_attention_bias
    shapes = canonical_shapes(checkpoint.config.is_tied, has_bias)
    return {w.name: w for w in load_weights(checkpoint, shapes, quantization)}


def assert_holds(loaded: Mapping[str, LoadedWeight], expected: Mapping[str, np.ndarray]) -> None:
    assert list(loaded) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(loaded[name].weight.dequantize(), np.atleast_2d(values))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_every_weight_of_every_kind_of_file(
    architecture: str, is_tied: bool, tmp_path: Path
) -> None:
    """GGUF interleaves the rows of q and k of llama models; both kinds of file give the same."""
    weights = random_weights(is_tied, has_bias=architecture == "qwen2")
    hf_class = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[architecture]
    changes = {"architectures": [hf_class], "tie_word_embeddings": is_tied}
    for path in (
        write_gguf(tmp_path / "m.gguf", weights, architecture),
        write_hf_folder(tmp_path / "hf", weights, changes=changes),
        write_hf_folder(tmp_path / "sharded", weights, shards=3, changes=changes),
    ):
        assert_holds(load(open_checkpoint(path), "f32"), weights)


def test_biases_of_a_llama_file_are_put_in_order_too(tmp_path: Path) -> None:
    weights = random_weights(has_bias=True)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights))
    assert checkpoint.config.has_attention_bias
    assert_holds(load(checkpoint, "f32"), weights)


def test_quantised_rows_are_put_in_order_unchanged(tmp_path: Path) -> None:
    weights = random_weights()
    encodings = {name: GGMLQuantizationType.Q4_0 for name, w in weights.items() if w.ndim == 2}
    loaded = load(open_checkpoint(write_gguf(tmp_path / "m.gguf", weights, encodings=encodings)))
    for name in encodings:
        expected = quants.dequantize(
            quants.quantize(weights[name], GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0
        )
        np.testing.assert_array_equal(loaded[name].weight.dequantize(), expected)
        assert (loaded[name].source_encoding, loaded[name].relative_error) == ("Q4_0", 0.0)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantization_applies_to_matrices_and_spares_the_head(
    quantization: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(write_hf_folder(tmp_path, random_weights()))
    matrix = "bf16" if quantization == "auto" else quantization
    head = "q8" if quantization in ("q4", "q4_0", "q4_z", "q4_k", "q5_k") else matrix
    for name, loaded in load(checkpoint, quantization).items():
        is_vector = len(checkpoint.tensors[name].shape) == 1
        expected = "f32" if is_vector else head if name in ("embed", "lm_head") else matrix
        assert loaded.weight.format == expected, name
        assert (loaded.relative_error > 0) == (expected != "f32"), name


def test_safetensors_need_not_be_aligned(tmp_path: Path) -> None:
    weights = {n: w.astype(ml_dtypes.bfloat16) for n, w in random_weights().items()}
    folder = write_hf_folder(tmp_path, weights)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header_len = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + header_len].rstrip() + b" "
    header += b" " * (len(header) % 2 == 0)
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + header_len :])
    assert_holds(
        load(open_checkpoint(folder)), {n: w.astype(np.float32) for n, w in weights.items()}
    )


def test_what_does_not_matter_is_left_out(tmp_path: Path) -> None:
    weights = random_weights(is_tied=True)
    head = random_weights()["lm_head"]
    folder = write_hf_folder(
        tmp_path, weights | {"lm_head": head}, changes={"tie_word_embeddings": True}
    )
    assert list(load(open_checkpoint(folder))) == list(weights)


def test_missing_unexpected_and_misshapen_tensors(tmp_path: Path) -> None:
    weights = random_weights()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights))
    shapes = canonical_shapes()
    with pytest.raises(ModelFileError, match=r"m\.gguf: tensor blk\.2\.attn_q\.weight is missing"):
        load_weights(checkpoint, shapes | {"layers.2.q": (64, 64)})
    with pytest.raises(
        ModelFileError, match=r"blk\.0\.attn_output\.weight has shape \[64, 64\], expected \[64, 32"
    ):
        load_weights(checkpoint, shapes | {"layers.0.o": (64, 32)})
    del shapes["layers.1.up"], shapes["layers.1.down"]
    with pytest.raises(
        UnsupportedModelError, match=r"'blk\.1\.ffn_up\.weight' and 1 more is not part"
    ):
        load_weights(checkpoint, shapes)
    with pytest.raises(UsageError, match="quantization is 'q3', possible are auto, q4"):
        load_weights(checkpoint, shapes, "q3")


def test_encoding_that_we_cannot_decode_is_named(tmp_path: Path) -> None:
    weights = random_weights() | {"layers.0.o": np.ones((64, 64), np.int64)}
    checkpoint = open_checkpoint(write_hf_folder(tmp_path, weights))
    with pytest.raises(
        UnsupportedModelError,
        match=r"layers\.0\.self_attn\.o_proj\.weight is encoded as I64, supported",
    ):
        load(checkpoint)


def test_weight_that_is_not_finite_is_named_with_its_file(tmp_path: Path) -> None:
    weights = random_weights()
    weights["layers.1.attn_norm"][3] = np.nan
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights))
    with pytest.raises(ModelFileError, match=r"m\.gguf: tensor blk\.1\.attn_norm\.weight holds"):
        load(checkpoint)


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    class Counting(SilentProgress):
        done = 0

        def advance(self, num_bytes: int) -> None:
            self.done += num_bytes

    progress = Counting()
    checkpoint = open_checkpoint(write_hf_folder(tmp_path, random_weights()))
    list(load_weights(checkpoint, canonical_shapes(), progress=progress))
    assert progress.done == sum(w.nbytes for w in random_weights().values())


def test_fingerprint_follows_the_files_and_not_their_place(tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path / "a", random_weights(), shards=2)
    before = fingerprint_model(folder)
    assert open_checkpoint(folder).fingerprint() == before
    moved = folder.rename(tmp_path / "b")
    assert fingerprint_model(moved) == before
    config = moved / "config.json"
    config.write_text(config.read_text().replace("10000.0", "20000.0"))
    assert fingerprint_model(moved) != before


def test_paths_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file or folder"):
        open_checkpoint(tmp_path / "missing.gguf")
    with pytest.raises(ModelNotFoundError, match=r"has no \.safetensors and no \.gguf"):
        open_checkpoint(tmp_path)
    folder = write_hf_folder(tmp_path / "m", random_weights())
    with pytest.raises(UnsupportedModelError, match=r"the folder that holds config\.json"):
        open_checkpoint(folder / "model.safetensors")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"config\.json: is not JSON"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelFileError, match=r"config\.json: no such file"):
        open_checkpoint(folder)


def test_folder_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", random_weights())
    assert open_checkpoint(tmp_path).path == tmp_path / "a.gguf"
    write_gguf(tmp_path / "b.gguf", random_weights())
    with pytest.raises(ModelFileError, match=r"has 2 \.gguf files; give one of them"):
        open_checkpoint(tmp_path)


def test_generation_config_names_the_end_tokens(tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path, random_weights())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert open_checkpoint(folder).config.eos_ids == (2, 7)

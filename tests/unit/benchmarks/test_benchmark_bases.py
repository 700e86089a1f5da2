"""Models that formats are measured on: off the grid of their file, but within its cells."""

import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, quants

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import dither
import llama2c


def write(path: Path, blocks: np.ndarray, kind: quants.GGMLQuantizationType) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=kind)
    writer.add_tensor("blk.0.ffn_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def values_of(path: Path) -> np.ndarray:
    tensor = GGUFReader(path).get_tensor(0)
    return quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "Q4_0"])
def test_dithered_weights_fill_their_cells_evenly(tmp_path: Path, name: str) -> None:
    kind = quants.GGMLQuantizationType[name]
    values = np.random.default_rng(0).standard_normal((64, 512), np.float32)
    source = write(tmp_path / "source.gguf", quants.quantize(values, kind), kind)
    dither.dither(source, tmp_path / "made.gguf", seed=1)
    dither.dither(source, tmp_path / "again.gguf", seed=1)
    old, new = values_of(source), values_of(tmp_path / "made.gguf")
    groups = values.reshape(64, -1, 32)
    span = {
        "Q4_1": np.ptp(groups, axis=2) / 15,
        "Q8_0": np.abs(groups).max(axis=2) / 127,
        "Q4_0": np.abs(groups).max(axis=2) / 8,
    }[name]
    moved = (new - old).reshape(groups.shape) / span[..., None]
    assert np.abs(moved).max() < 1.01  # half a cell, and what bfloat16 rounds away
    assert moved.std() == pytest.approx(1 / np.sqrt(12), rel=0.15)
    assert abs(moved.mean()) < 0.01
    assert (tmp_path / "made.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()
    norm = GGUFReader(tmp_path / "made.gguf").get_tensor(1)
    assert (norm.tensor_type.name, norm.data.tolist()) == ("F32", [1.0] * 64)


def test_tensors_of_llama2_c_come_in_the_order_of_run_c() -> None:
    sizes = dict(zip(llama2c.FIELDS, (4, 6, 2, 2, 1, 3, 8), strict=True))
    count = 3 * 4 + 2 * (4 + 16 + 8 + 8 + 16 + 4 + 24 + 24 + 24) + 4
    found = dict(llama2c.tensors(np.arange(count + 5, dtype=np.float32), sizes))
    assert found["token_embd.weight"][0, 0] == 0
    assert found["blk.1.attn_norm.weight"][0] == 12 + 4
    assert found["blk.0.attn_k.weight"].shape == (2, 4)
    assert found["blk.0.ffn_down.weight"].shape == (4, 6)
    assert found["output_norm.weight"][-1] == count - 1

"""Modules that the tools themselves wrote (tests/data/checkpoints), and what they say they mean."""

import json
from pathlib import Path

import numpy as np
import pytest

from tokenmill.models.mapped import UnpackedTensor
from tokenmill.models.quantized import unpack_quantized
from tokenmill.models.quantized.float8 import FLOAT8
from tokenmill.models.quantized.integers import INTEGER_ENCODINGS
from tokenmill.models.safetensors import read_safetensors
from tokenmill.models.weights import decode

FOLDERS = Path(__file__).parents[1] / "data" / "checkpoints"
FORMATS = {
    "autoawq": "q4_z",
    "gptqmodel-8bit": "q8",
    "gptqmodel-act-order": "q8",
    "gptqmodel-v2": "q4_z",
    "gptqmodel-zero-points": "q4_z",
    "llmcompressor-awq": "q4_z",
    "llmcompressor-fp8-block": "f8",
    "llmcompressor-fp8-dynamic": "f8",
    "llmcompressor-w4a16-zero-points": "q4_z",
    "llmcompressor-w8a8": "q8",
}
"""By folder: the format that holds it, or is nearest to it."""


def test_there_is_a_row_for_each_folder() -> None:
    assert sorted(FORMATS) == sorted(path.name for path in FOLDERS.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_what_the_tool_says(name: str) -> None:
    folder = FOLDERS / name
    config = json.loads((folder / "config.json").read_text())
    tensors = unpack_quantized(folder, config, read_safetensors(folder))
    tensor = tensors["module.weight"]
    assert isinstance(tensor, UnpackedTensor)
    assert set(tensors) <= {"module.weight", "module.bias"}
    expected = np.load(folder / "expected.npy")
    exact, _ = decode(tensor.read("module"), "f32")
    np.testing.assert_allclose(exact.quants[::8], expected, rtol=1e-6, atol=1e-9)
    encoding = tensor.info.encoding
    target = "f8" if encoding == FLOAT8 else INTEGER_ENCODINGS.get(encoding, "q8")
    assert target == FORMATS[name]
    found, error = decode(tensor.read("module"), target)
    if "act-order" in name:
        assert 0 < error < 0.01
    else:
        assert error < 1e-7
        np.testing.assert_allclose(found.dequantize()[::8], expected, rtol=1e-6, atol=1e-9)

"""GGUF files that `quantize` makes of folders: of every architecture, read back, and as llama.cpp's
own converter would have named what is in them.
"""

import json
import os
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.numpy import load_file

from tests.e2e.architecture_files import CASES, Case, make_model, write_gguf
from tests.quantized_modules import SCHEMES, write_safetensors
from tests.unit import tiny_tokenizers
from tokenmill.errors import UnsupportedModelError
from tokenmill.models.checkpoint import open_checkpoint
from tokenmill.models.quantizing import quantize_model
from tokenmill.models.registry import build_graph
from tokenmill.models.text.load import load_tokenizer
from tokenmill.models.weights import decode, load_weights

VOCAB = 300  # more than the tokenizer has
WIDE = ("embed", "lm_head")


@cache
def case(name: str) -> Case:
    options = {"hidden_size": 96, "vocab_size": VOCAB, "pad_token_id": None}
    return replace(CASES[name], options={**CASES[name].options, **options})


def write_folder(folder: Path, name: str, **changes: object) -> Any:
    """A random model with a tokenizer; transformers' own object of it."""
    model = make_model(case(name))
    model.save_pretrained(folder)
    tiny_tokenizers.write_folder(folder, tokenizer_config={"chat_template": "{{ messages }}"})
    if changes:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_file_says_what_the_folder_says(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path, name)
    made = quantize_model(tmp_path, tmp_path / "model.gguf", "q4")
    assert made.num_rounded
    folder, file = open_checkpoint(tmp_path), open_checkpoint(tmp_path / "model.gguf")
    graph = build_graph(file.config)
    shapes = {n: tuple(int(d) for d in t.shape) for n, t in graph.weights().items()}
    assert shapes == {n: tuple(t.shape) for n, t in build_graph(folder.config).weights().items()}
    for found in load_weights(file, shapes, "f32"):
        expected = decode(folder.read(found.name), rounded(found.name, shapes[found.name]))[0]
        np.testing.assert_array_equal(found.weight.quants, expected.dequantize(), found.name)


def rounded(name: str, shape: tuple[int, ...]) -> str:
    """The format that a tensor has in a q4 file."""
    if len(shape) == 1 or name.endswith("router") or shape[-1] % 32:
        return "f32"
    return "q8" if name in WIDE else "q4"


@pytest.mark.parametrize("name", CASES)
def test_names_sizes_and_keys_are_those_of_llama_cpp_s_converter(name: str, tmp_path: Path) -> None:
    model = write_folder(tmp_path, name)
    quantize_model(tmp_path, tmp_path / "ours.gguf", "q8")
    ours = GGUFReader(tmp_path / "ours.gguf")
    theirs = GGUFReader(write_gguf(tmp_path / "theirs.gguf", model, case(name)))
    assert {t.name: tuple(t.shape) for t in ours.tensors} == {
        t.name: tuple(t.shape) for t in theirs.tensors
    }
    arch = theirs.fields["general.architecture"].contents()
    for key, field in theirs.fields.items():
        if key.startswith(f"{arch}.") and not is_left_out(key, field.contents()):
            found = ours.fields[key]
            wanted = field.contents()
            is_number = isinstance(wanted, int | float)
            assert found.contents() == (pytest.approx(wanted, rel=1e-6) if is_number else wanted)
            assert found.types == field.types, key
    for tensor in ours.tensors:
        vector = len(tensor.shape) == 1 or "ffn_gate_inp" in tensor.name
        assert (tensor.tensor_type.name == "F32") >= vector, tensor.name


def is_left_out(key: str, value: object) -> bool:
    """A window of none; experts' sizes where a file without them means the same."""
    return key.endswith("sliding_window") and value == 0


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    write_folder(tmp_path, "qwen3")
    quantize_model(tmp_path, tmp_path / "model.gguf", "q8")
    metadata = open_checkpoint(tmp_path / "model.gguf").tokenizer_metadata
    assert metadata is not None
    assert metadata["tokenizer.ggml.pre"] == "qwen2"
    ours, theirs = load_tokenizer(metadata), load_tokenizer(tmp_path)
    assert (ours.vocab_size, ours.special_ids) == (theirs.vocab_size, theirs.special_ids)
    assert ours.chat_templates == theirs.chat_templates == {"default": "{{ messages }}"}
    assert set(ours.eos_ids) == set(theirs.eos_ids)
    for text in ("hello <|im_end|> 123 é", "<tool>hell", "", "\n\n a"):
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("smollm 3", {"no_rope_layers": [1, 0, 1, 1, 1]}, "a GGUF file cannot tell rope"),
        ("qwen3 moe", {"norm_topk_prob": False}, "a GGUF file cannot tell is_renormalized"),
        ("gemma 2", {"query_pre_attn_scalar": 24}, "a GGUF file cannot tell attention_scale"),
        (
            "qwen2, yarn",
            {"rope_parameters": {**dict(CASES["llama 3"].options)["rope_parameters"]}},  # type: ignore[dict-item]
            "rope_type is 'llama3', which a GGUF file of a qwen2 model cannot say",
        ),
    ],
)
def test_what_a_file_cannot_say_is_refused(
    name: str, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    write_folder(tmp_path, name, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        quantize_model(tmp_path, tmp_path / "model.gguf", "q8")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("scheme_name", ["gptq, zero points", "awq, no zero points", "fp8, blocks"])
def test_a_quantised_folder_becomes_a_file(scheme_name: str, tmp_path: Path) -> None:
    """Integers that the file's types hold go into it as they are."""
    scheme, rng = SCHEMES[scheme_name], np.random.default_rng(0)
    write_folder(tmp_path, "mistral", quantization_config=dict(scheme.config))
    tensors = load_file(tmp_path / "model.safetensors")
    wanted = {}
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        parts, wanted[key] = scheme.make(rng, *tensors.pop(key).shape)
        tensors |= {f"{key.removesuffix('.weight')}.{p}": array for p, array in parts.items()}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    quantize_model(tmp_path, tmp_path / "model.gguf", "q8")
    names = {"layers.0.down": "model.layers.0.mlp.down_proj.weight"}
    names |= {"layers.2.q": "model.layers.2.self_attn.q_proj.weight"}
    shapes = {name: wanted[key].shape for name, key in names.items()}
    file = open_checkpoint(tmp_path / "model.gguf")
    for name, key in names.items():
        found = decode(file.read(name), "f32")[0].quants
        assert found.shape == shapes[name]
        most = 0.008 if scheme_name.startswith("fp8") else 0
        assert np.linalg.norm(found - wanted[key]) <= most * np.linalg.norm(found)


WINDOWLESS = {"mistral": 30, "phi 3": 30}  # llama.cpp takes no notice of their windows


@pytest.mark.skipif(
    not os.environ.get("TOKENMILL_PEER_PYTHON"),
    reason="TOKENMILL_PEER_PYTHON names no interpreter that has xllamacpp",
)
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same_from_the_file(name: str, tmp_path: Path) -> None:
    model = write_folder(tmp_path, name)
    path, place = tmp_path / "model.gguf", tmp_path / "logits"
    quantize_model(tmp_path, path, "q8")
    tokens = np.random.default_rng(1).integers(0, VOCAB, WINDOWLESS.get(name, 90)).tolist()
    request = {"op": "logits", "model": str(path), "threads": 1, "tokens": tokens}
    peer = Path(__file__).parents[2] / "benchmarks" / "peer.py"
    subprocess.run(
        [os.environ["TOKENMILL_PEER_PYTHON"], str(peer)],
        input=json.dumps(request | {"path": str(place)}) + "\n",
        text=True,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    theirs = np.fromfile(place, np.float32).reshape(len(tokens), VOCAB)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    errors = np.linalg.norm(theirs - expected, axis=1) / np.linalg.norm(expected, axis=1)
    # Its activations have 8 bits, which now and then send a token to another expert.
    assert np.median(errors) < 0.12

"""Folders that tools of GPTQ, AWQ, compressed-tensors and FP8 wrote: what their weights are."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from model_files import HF_CONFIG, canonical_shapes, hf_name, random_weights

from tests.quantized_modules import (
    AWQ,
    FP8,
    GPTQ,
    SCHEMES,
    Scheme,
    compressed,
    fp8,
    gptq,
    int_quantized,
    pack_quantized,
    write_safetensors,
)
from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.models.checkpoint import fingerprint_model, open_checkpoint
from tokenmill.models.mapped import UnpackedTensor
from tokenmill.models.quantized import unpack_quantized
from tokenmill.models.safetensors import read_safetensors
from tokenmill.models.weights import LoadedWeight, decode, load_weights, target_formats

LINEARS = {n: s for n, s in canonical_shapes().items() if len(s) == 2 and n.startswith("layers")}
Tensors = dict[str, np.ndarray]


def quantised(scheme: Scheme) -> tuple[Tensors, Tensors]:
    """The tensors of a folder by name, and the weights of the model by canonical name."""
    rng = np.random.default_rng(7)
    weights = random_weights()
    tensors = {hf_name(n): w for n, w in weights.items() if n not in LINEARS}
    for name, (n, k) in LINEARS.items():
        parts, weights[name] = scheme.make(rng, n, k)
        module = hf_name(name).removesuffix(".weight")
        tensors |= {f"{module}.{part}": array for part, array in parts.items()}
    return tensors, weights


def write_folder(folder: Path, tensors: Tensors, quantization: Mapping[str, object] | None) -> Path:
    folder.mkdir(exist_ok=True)
    config = HF_CONFIG | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def load(folder: Path, quantization: str = "auto") -> dict[str, LoadedWeight]:
    shapes = canonical_shapes()
    return {w.name: w for w in load_weights(open_checkpoint(folder), shapes, quantization)}


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_what_the_format_says(name: str, tmp_path: Path) -> None:
    scheme = SCHEMES[name]
    tensors, weights = quantised(scheme)
    folder = write_folder(tmp_path, tensors, scheme.config)
    for found in load(folder, "f32").values():
        expected = weights[found.name].reshape(found.weight.shape)
        np.testing.assert_array_equal(found.weight.dequantize(), expected, found.name)


@pytest.mark.parametrize("name", SCHEMES)
def test_by_default_weights_keep_their_bits_or_say_what_it_cost(name: str, tmp_path: Path) -> None:
    scheme = SCHEMES[name]
    tensors, weights = quantised(scheme)
    folder = write_folder(tmp_path, tensors, scheme.config)
    formats = target_formats(open_checkpoint(folder), canonical_shapes(), "auto")
    found = load(folder)
    for linear in LINEARS:
        weight, error = found[linear].weight, found[linear].relative_error
        assert weight.format == formats[linear] == scheme.format
        values = weights[linear]
        real = np.linalg.norm(weight.dequantize() - values) / np.linalg.norm(values)
        assert error == pytest.approx(real, rel=1e-3, abs=1e-9)
        assert error <= scheme.most_error
    assert found["lm_head"].weight.format == "bf16"


@pytest.mark.parametrize("name", ["gptq, zero points", "awq"])
def test_q8_holds_integers_with_zero_points_exactly(name: str, tmp_path: Path) -> None:
    tensors, _ = quantised(SCHEMES[name])
    folder = write_folder(tmp_path, tensors, SCHEMES[name].config)
    found = load(folder, "q8")
    assert all(found[linear].relative_error == 0 for linear in LINEARS)


def test_a_zero_point_of_16_is_read_as_such(tmp_path: Path) -> None:
    scheme = SCHEMES["gptq, zero points"]
    tensors, _ = quantised(scheme)
    name = hf_name("layers.0.o").removesuffix(".weight")
    tensors[f"{name}.qzeros"][:] = -1  # every nibble 15
    found = load(write_folder(tmp_path, tensors, scheme.config), "f32")
    integers = tensors[f"{name}.qweight"].view(np.uint32)[0, 5] & 15
    expected = np.float32(tensors[f"{name}.scales"][0, 5]) * np.float32(int(integers) - 16)
    assert found["layers.0.o"].weight.dequantize()[5, 0] == expected


def test_act_order_by_name_only_is_read_as_it_is(tmp_path: Path) -> None:
    tensors, _ = quantised(SCHEMES["gptq"])
    folder = write_folder(tmp_path, tensors, GPTQ | {"desc_act": True})
    assert load(folder)["layers.0.q"].weight.format == "q4_0"


@pytest.mark.parametrize(
    ("file", "content", "scheme"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "sym": True}, "gptq"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True}, "awq"),
    ],
)
def test_older_folders_have_a_file_of_their_own(
    file: str, content: dict[str, object], scheme: str, tmp_path: Path
) -> None:
    tensors, weights = quantised(SCHEMES[scheme])
    folder = write_folder(tmp_path, tensors, None)
    (folder / file).write_text(json.dumps(content))
    found = load(folder, "f32")["layers.1.down"].weight.dequantize()
    np.testing.assert_array_equal(found, weights["layers.1.down"])
    before = fingerprint_model(folder)
    (folder / file).write_text(json.dumps(content | {"damp_percent": 0.1}))
    assert fingerprint_model(folder) != before


def test_biases_of_zeros_that_the_model_does_not_have_are_left_out(tmp_path: Path) -> None:
    tensors, _ = quantised(SCHEMES["gptq"])
    for name in ("layers.0.k", "layers.0.o"):
        tensors[hf_name(name).replace("weight", "bias")] = np.zeros(LINEARS[name][0], np.float16)
    folder = write_folder(tmp_path, tensors, GPTQ)
    assert "layers.0.k_bias" not in open_checkpoint(folder).tensors
    load(folder)
    tensors[hf_name("layers.0.o").replace("weight", "bias")][3] = 1
    with pytest.raises(UnsupportedModelError, match=r"o_proj\.bias"):
        load(write_folder(tmp_path, tensors, GPTQ))


def test_scales_of_activations_and_caches_are_not_needed(tmp_path: Path) -> None:
    scheme = SCHEMES["compressed fp8"]
    tensors, _ = quantised(scheme)
    for part in ("q_proj.input_scale", "k_proj.k_scale", "v_proj.output_scale"):
        tensors[f"model.layers.0.self_attn.{part}"] = np.ones(1, np.float32)
    assert load(write_folder(tmp_path, tensors, scheme.config))


def test_what_is_meant_for_activations_and_caches_is_told(tmp_path: Path) -> None:
    tensors, _ = quantised(SCHEMES["int8"])
    config = compressed("int-quantized", num_bits=8, strategy="channel")
    assert open_checkpoint(write_folder(tmp_path, tensors, config)).notes == ()
    groups = config["config_groups"]
    assert isinstance(groups, dict)
    scheme = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
    groups["group_0"]["input_activations"] = scheme
    config["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
    notes = open_checkpoint(write_folder(tmp_path, tensors, config)).notes
    assert [note.removeprefix(f"{tmp_path}: ") for note in notes] == [
        "quantization_config rounds activations to int8 (dynamic scales by token); "
        "here --activations says how",
        "quantization_config rounds the KV cache to fp8 (static scales); here --kv-cache says how",
    ]
    tensors, _ = quantised(SCHEMES["fp8, blocks"])
    [note] = open_checkpoint(write_folder(tmp_path, tensors, SCHEMES["fp8, blocks"].config)).notes
    assert "rounds activations to fp8 (dynamic scales)" in note


def test_one_config_may_have_several_sizes(tmp_path: Path) -> None:
    """llm-compressor keeps some modules at 8 bits; which is told by the tensors."""
    config = compressed("mixed-precision", strategy="group", group_size=32)
    more = {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8, "strategy": "channel"}}
    config["config_groups"] = {**config["config_groups"], "group_1": more}  # type: ignore[dict-item]
    wide = partial(pack_quantized, bits=8, group=-1)
    scheme = Scheme(
        make=lambda rng, n, k: (wide if k == 96 else pack_quantized)(rng, n, k),
        config=config,
        format="",
    )
    tensors, weights = quantised(scheme)
    found = load(write_folder(tmp_path, tensors, config))
    assert found["layers.0.down"].weight.format == "q8"
    assert found["layers.0.up"].weight.format == "q4_0"
    for name in ("layers.0.down", "layers.0.up"):
        np.testing.assert_array_equal(found[name].weight.dequantize(), weights[name])


REFUSED = {
    "bits": (GPTQ | {"bits": 3}, "bits is 3, supported is 4 or 8"),
    "group": (GPTQ | {"group_size": 16}, "group_size is 16, supported is a multiple of 32, or -1"),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'.*'gptq'"),
    "pack": (GPTQ | {"pack_dtype": "int8"}, "pack_dtype is 'int8', supported is 'int32'"),
    "dynamic": (GPTQ | {"dynamic": {"+:.*down": {"bits": 8}}}, "dynamic.*supported is leaving"),
    "gemv": (AWQ | {"version": "gemv"}, "version is 'gemv', supported is 'gemm'"),
    "awq bits": (AWQ | {"bits": 8}, "bits is 8, supported is 4"),
    "fp8": (FP8 | {"fmt": "e5m2"}, "fmt is 'e5m2', supported is 'e4m3'"),
    "method": ({"quant_method": "aqlm"}, "quant_method is 'aqlm', supported is 'gptq' or 'awq'"),
    "torchao": ({"quant_method": "torchao"}, "quant_method is 'torchao', supported is 'gptq'"),
    "mxfp4": (compressed("mxfp4-pack-quantized"), "format is 'mxfp4-pack-quantized'"),
    "nvfp4": (compressed("nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'"),
    "2 bits": (compressed("pack-quantized", num_bits=2), "num_bits is 2, supported is 4 or 8"),
    "sparse": (
        compressed("pack-quantized") | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparsity_config is .* supported is absence",
    ),
    "rotated": (
        compressed("pack-quantized") | {"transform_config": {"config_groups": {"R1": {}}}},
        "transform_config is",
    ),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "quant_method is 'bitsandbytes': .*original weights, which --quantization q8 or q4",
    ),
    "old bitsandbytes": ({"load_in_8bit": True}, "quant_method is 'bitsandbytes'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_refusal_names_key_value_and_what_is_supported(name: str, tmp_path: Path) -> None:
    config, message = REFUSED[name]
    tensors, _ = quantised(SCHEMES["gptq"])
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(write_folder(tmp_path, tensors, config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (["gptq"], "quantization_config is .*expected an object"),
        ({"bits": 4}, "quant_method is missing"),
        (GPTQ | {"bits": None}, "bits is missing"),
        (GPTQ | {"group_size": "32"}, "group_size is '32', expected an integer"),
        (GPTQ | {"sym": 1}, "sym is 1, expected true or false"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size is .*expected two sizes"),
        ({"quant_method": "compressed-tensors"}, "config_groups is None, expected an object"),
    ],
)
def test_a_malformed_config_is_refused(
    config: Mapping[str, object], message: str, tmp_path: Path
) -> None:
    tensors, _ = quantised(SCHEMES["gptq"])
    with pytest.raises(ModelFileError, match=message):
        open_checkpoint(write_folder(tmp_path, tensors, config))


O_PROJ = "model.layers.0.self_attn.o_proj"
DAMAGES = [
    ("gptq", "scales", lambda a: None, r"o_proj\.scales is missing"),
    ("gptq", "scales", lambda a: a[:1], r"scales has shape \[1, 64\]; expected \[2, 64\]"),
    ("gptq", "scales", lambda a: a.astype(np.int32), "scales is I32; expected F16 or BF16"),
    ("gptq", "qzeros", lambda a: a[:, :3], r"qzeros has shape \[2, 3\]; expected \[2, 8\]"),
    ("gptq", "qweight", lambda a: a.reshape(-1), "qweight has shape .*expected 2 dimensions"),
    ("gptq", "qweight", lambda a: a[:4], r"scales has shape \[2, 64\]; expected \[1, 64\]"),
    ("gptq", "g_idx", lambda a: a + 1, "g_idx names group 2; expected groups 0 to 1"),
    ("gptq", "g_idx", lambda a: a - 1, "g_idx names group 0; expected groups 0 to 1"),
    ("awq", "qzeros", lambda a: None, r"qzeros is missing"),
    ("awq", "qweight", lambda a: a[:, :4], r"scales has shape \[2, 64\]; expected \[2, 32\]"),
    ("packed int4", "weight_scale", lambda a: a[:, :1], "has 1 groups for 64 columns"),
    ("packed int4", "weight_shape", lambda a: a * 2, r"weight_shape says \[128, 128\]"),
    ("packed int4", "weight_shape", lambda a: a * 0, r"weight_shape says \[0, 0\]"),
    ("int8", "weight_scale", lambda a: a[:5], r"weight_scale has shape \[5, 1\]"),
    ("int8", "weight", lambda a: None, r"o_proj\.weight is missing"),
    ("fp8, blocks", "weight_scale_inv", lambda a: a[:1], "weight_scale_inv has shape"),
    ("fp8, blocks", "weight", lambda a: a.astype(np.float32), "weight is F32; expected F8_E4M3"),
]


@pytest.mark.parametrize(("name", "part", "damage", "message"), DAMAGES)
def test_tensors_that_do_not_fit_together_are_named(
    name: str, part: str, damage: object, message: str, tmp_path: Path
) -> None:
    tensors, _ = quantised(SCHEMES[name])
    assert callable(damage)
    changed = damage(tensors.pop(f"{O_PROJ}.{part}"))
    if changed is not None:
        tensors[f"{O_PROJ}.{part}"] = changed
    with pytest.raises(ModelFileError, match=message):
        open_checkpoint(write_folder(tmp_path, tensors, SCHEMES[name].config))


def test_a_module_of_another_size_is_refused_like_any_tensor(tmp_path: Path) -> None:
    tensors, _ = quantised(SCHEMES["gptq"])
    parts, _ = gptq(np.random.default_rng(0), 64, 128)
    tensors |= {f"{O_PROJ}.{part}": array for part, array in parts.items()}
    with pytest.raises(ModelFileError, match=r"\.o_proj\.weight has shape \[64, 128\], expec"):
        load(write_folder(tmp_path, tensors, GPTQ))


def test_zero_points_that_the_config_denies_are_refused(tmp_path: Path) -> None:
    tensors, _ = quantised(SCHEMES["gptq, zero points"])
    folder = write_folder(tmp_path, tensors, GPTQ)
    with pytest.raises(ModelFileError, match=r'qzeros has zero points other than 8.*"sym": false'):
        load(folder)


@pytest.mark.parametrize("name", ["int8", "fp8, blocks", "compressed fp8"])
def test_weights_that_are_not_finite_are_refused(name: str, tmp_path: Path) -> None:
    tensors, _ = quantised(SCHEMES[name])
    part = next(p for p in ("weight_scale", "weight_scale_inv") if f"{O_PROJ}.{p}" in tensors)
    tensors[f"{O_PROJ}.{part}"][0, 0] = np.nan
    with pytest.raises(
        ModelFileError, match=r"\.o_proj\.weight holds weights that are infinite or not"
    ):
        load(write_folder(tmp_path, tensors, SCHEMES[name].config))


def test_float8_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    tensors, _ = quantised(SCHEMES["compressed fp8"])
    tensors[f"{O_PROJ}.weight"][3, 5] = np.nan
    with pytest.raises(
        ModelFileError, match=r"\.o_proj\.weight holds weights that are infinite or not"
    ):
        load(write_folder(tmp_path, tensors, SCHEMES["compressed fp8"].config))


def test_float8_of_all_bits_is_what_a_reference_says(tmp_path: Path) -> None:
    """All 254 numbers, subnormal ones too, in rows that cross blocks and end within one."""
    numbers = np.arange(256, dtype=np.uint8)
    numbers = numbers[numbers & 0x7F != 0x7F].view(ml_dtypes.float8_e4m3fn)
    weight = np.stack([np.roll(np.resize(numbers, 300), i) for i in range(200)])
    scales = np.random.default_rng(0).uniform(1e-4, 1e-2, (2, 3)).astype(np.float32)
    parts = {"m.weight": weight, "m.weight_scale_inv": scales}
    write_folder(tmp_path, parts, FP8)
    config = {"quantization_config": FP8}
    (tensor,) = unpack_quantized(tmp_path, config, read_safetensors(tmp_path)).values()
    found, error = decode(tensor.read("m"), "f8")
    wide = np.kron(scales, np.ones((128, 128), np.float32))[:200, :300]
    np.testing.assert_array_equal(found.dequantize(), weight.astype(np.float32) * wide)
    assert error == 0


@pytest.mark.parametrize("k", [32, 40, 65, 200])
def test_rows_may_end_within_a_group(k: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(k)
    config = compressed("pack-quantized", strategy="channel", symmetric=False)
    for parts, weight in (
        pack_quantized(rng, 9, k, group=-1, is_symmetric=False, scale_dtype=np.float16),
        int_quantized(rng, 9, k),
        fp8(rng, 9, k, kind="channel", scale_name="weight_scale"),
    ):
        folder = write_folder(tmp_path, {f"m.{p}": a for p, a in parts.items()}, config)
        file = {"quantization_config": config}
        (tensor,) = unpack_quantized(folder, file, read_safetensors(folder)).values()
        assert isinstance(tensor, UnpackedTensor)
        np.testing.assert_array_equal(decode(tensor.read("m"), "f32")[0].quants, weight)
        some = decode(tensor.rows(2, 7).rows(1, 4).read("m"), "f32")[0]
        np.testing.assert_array_equal(some.quants, weight[3:6])
        assert decode(tensor.read("m"), "q8")[1] < 0.008


def test_compressed_tensors_own_packer_says_the_same(tmp_path: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    torch = pytest.importorskip("torch")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    rng = np.random.default_rng(3)
    tensors, _ = quantised(SCHEMES["packed int4"])
    expected = {}
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    packer = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    for name, (n, k) in LINEARS.items():
        values = torch.tensor(rng.standard_normal((n, k)), dtype=torch.float32)
        groups = values.reshape(n, -1, 32)
        low, high = groups.amin(2), groups.amax(2)
        scale = ((high - low) / 15).to(torch.bfloat16)
        zero = (-8 - low / scale).round().clamp(-8, 7).to(torch.int8)
        state = {"weight": values, "weight_scale": scale, "weight_zero_point": zero}
        packed = packer.compress(state, scheme)
        expected[name] = packer.decompress(dict(packed), scheme)["weight"].float().numpy()
        module = hf_name(name).removesuffix(".weight")
        for part, tensor in packed.items():
            is_bf16 = tensor.dtype == torch.bfloat16
            array = tensor.view(torch.int16).numpy() if is_bf16 else tensor.numpy()
            tensors[f"{module}.{part}"] = array.view(ml_dtypes.bfloat16) if is_bf16 else array
    folder = write_folder(tmp_path, tensors, compressed("pack-quantized", **weights))
    found = load(folder, "f32")
    for name in LINEARS:  # theirs is rounded to bfloat16 in the end
        np.testing.assert_allclose(found[name].weight.quants, expected[name], rtol=2**-8)

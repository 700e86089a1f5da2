"""Modules as the tools of GPTQ, AWQ, compressed-tensors and FP8 write them, and their weights.

Written from the formats' descriptions, value by value where that is plainest; shares nothing with
the package. Each function returns the tensors of a module by the end of their names, and the
weight [N, K] in float32 that they stand for.
"""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

Parts = dict[str, np.ndarray]
Made = tuple[Parts, np.ndarray]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # outputs of a word, from its lowest nibble


def pack_first_axis(integers: np.ndarray, bits: int) -> np.ndarray:
    """Integers [M, ...] into int32 words [M * bits / 32, ...], the first in the lowest bits."""
    per_word = 32 // bits
    short = -len(integers) % per_word
    padded = np.pad(integers, ((0, short), (0, 0)))
    words = np.zeros((len(padded) // per_word, *padded.shape[1:]), np.uint32)
    for i in range(per_word):
        words |= padded[i::per_word].astype(np.uint32) << np.uint32(i * bits)
    return words.view(np.int32)


def random_integers(
    rng: np.random.Generator, n: int, k: int, bits: int, groups: int, is_symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers [N, K], scales [N, G] in float16, zero points [N, G]."""
    integers = rng.integers(0, 2**bits, (n, k))
    scales = (rng.uniform(0.5, 2, (n, groups)) * 0.06 / 2 ** (bits - 1)).astype(np.float16)
    zeros = rng.integers(1, 2**bits, (n, groups))
    if is_symmetric:
        zeros[:] = 2 ** (bits - 1)
    return integers, scales, zeros


def weight_of(
    integers: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group_of: np.ndarray
) -> np.ndarray:
    """scale * (integer - zero), column by column."""
    columns = [
        scales[:, group].astype(np.float32) * (integers[:, j] - zeros[:, group])
        for j, group in enumerate(group_of)
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def gptq(
    rng: np.random.Generator,
    n: int,
    k: int,
    *,
    bits: int = 4,
    group: int = 32,
    is_symmetric: bool = True,
    is_v2: bool = False,
    is_act_order: bool = False,
) -> Made:
    size = k if group == -1 else group
    groups = -(-k // size)
    integers, scales, zeros = random_integers(rng, n, k, bits, groups, is_symmetric)
    group_of = np.arange(k) // size
    if is_act_order:
        group_of = group_of[rng.permutation(k)]
    stored = zeros if is_v2 else zeros - 1
    parts = {
        "qweight": pack_first_axis(integers.T, bits),
        "qzeros": np.ascontiguousarray(pack_first_axis(stored, bits).T),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": group_of.astype(np.int32),
    }
    return parts, weight_of(integers, scales, zeros, group_of)


def awq(
    rng: np.random.Generator, n: int, k: int, *, group: int = 32, has_zeros: bool = True
) -> Made:
    size = k if group == -1 else group
    integers, scales, zeros = random_integers(rng, n, k, 4, -(-k // size), not has_zeros)

    def pack(rows: np.ndarray) -> np.ndarray:
        words = np.zeros((rows.shape[0], rows.shape[1] // 8), np.uint32)
        for place, output in enumerate(AWQ_ORDER):
            words |= rows[:, output::8].astype(np.uint32) << np.uint32(4 * place)
        return words.view(np.int32)

    parts = {"qweight": pack(integers.T), "scales": np.ascontiguousarray(scales.T)}
    parts |= {"qzeros": pack(zeros.T)} if has_zeros else {}
    return parts, weight_of(integers, scales, zeros, np.arange(k) // size)


def pack_quantized(
    rng: np.random.Generator,
    n: int,
    k: int,
    *,
    bits: int = 4,
    group: int = 32,
    is_symmetric: bool = True,
    is_act_order: bool = False,
    scale_dtype: type = ml_dtypes.bfloat16,
) -> Made:
    size = k if group == -1 else group
    integers, scales, zeros = random_integers(rng, n, k, bits, -(-k // size), is_symmetric)
    scales = scales.astype(scale_dtype)
    group_of = np.arange(k) // size
    if is_act_order:
        group_of = group_of[rng.permutation(k)]
    parts = {
        "weight_packed": np.ascontiguousarray(pack_first_axis(integers.T, bits).T),
        "weight_scale": scales,
        "weight_shape": np.array([n, k]),
    }
    parts |= {} if is_symmetric else {"weight_zero_point": pack_first_axis(zeros, bits)}
    parts |= {"weight_g_idx": group_of.astype(np.int32)} if is_act_order else {}
    return parts, weight_of(integers, scales, zeros, group_of)


def int_quantized(
    rng: np.random.Generator, n: int, k: int, *, has_zeros: bool = False, is_one: bool = False
) -> Made:
    integers = rng.integers(-128, 128, (n, k), dtype=np.int8)
    scales = rng.uniform(0.0004, 0.001, (1 if is_one else n, 1)).astype(np.float32)
    zeros = rng.integers(-20, 20, scales.shape, dtype=np.int8) * np.int8(has_zeros)
    parts = {"weight": integers, "weight_scale": scales.reshape(-1) if is_one else scales}
    parts |= {"weight_zero_point": zeros.reshape(parts["weight_scale"].shape)} if has_zeros else {}
    centred = integers.astype(np.float32) - zeros.astype(np.float32)
    return parts, centred * scales


def fp8(
    rng: np.random.Generator,
    n: int,
    k: int,
    *,
    kind: str = "block",
    block: tuple[int, int] = (128, 128),
    scale_name: str = "weight_scale_inv",
) -> Made:
    stored = (rng.standard_normal((n, k)) * 60).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    shape = {
        "tensor": (),
        "channel": (n, 1),
        "block": (-(-n // block[0]), -(-k // block[1])),
    }[kind]
    scales = rng.uniform(0.0005, 0.002, shape).astype(np.float32)
    wide = scales
    if kind == "block":
        blocks = np.ones(block, np.float32)
        wide = np.kron(scales, blocks)[:n, :k]
    weight = stored.astype(np.float32) * wide
    return {"weight": stored, scale_name: np.asarray(scales)}, weight


_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
    "int32": "I32",
    "int64": "I64",
}


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """A safetensors file; the library's own NumPy writer knows neither bfloat16 nor float8."""
    header: dict[str, object] = {}
    start = 0
    for name, array in tensors.items():
        place = [start, start + array.nbytes]
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": place,
        }
        start = place[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


GPTQ: dict[str, object] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
AWQ: dict[str, object] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
}
FP8: dict[str, object] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def compressed(form: str, **weights: object) -> dict[str, object]:
    """A quantization_config of compressed-tensors with one group of modules."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "sparsity_config": {},
    }


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How modules are made, what the config says of it, and what becomes of them by default."""

    make: Callable[[np.random.Generator, int, int], Made]
    config: Mapping[str, object]
    format: str  # that "auto" gives
    most_error: float = 0.0  # of it


SCHEMES: dict[str, Scheme] = {
    "gptq": Scheme(make=gptq, config=GPTQ, format="q4_0"),
    "gptq, group 64": Scheme(
        make=partial(gptq, group=64), config=GPTQ | {"group_size": 64}, format="q4_0"
    ),
    "gptq, whole rows": Scheme(
        make=partial(gptq, group=-1), config=GPTQ | {"group_size": -1}, format="q4_0"
    ),
    "gptq, zero points": Scheme(
        make=partial(gptq, is_symmetric=False),
        config=GPTQ | {"sym": False},
        format="q4_z",
    ),
    "gptq v2, zero points": Scheme(
        make=partial(gptq, is_symmetric=False, is_v2=True),
        config=GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
        format="q4_z",
    ),
    "gptq, act-order": Scheme(
        make=partial(gptq, is_act_order=True),
        config=GPTQ | {"desc_act": True},
        format="q8",
        most_error=0.008,
    ),
    "gptq, 8 bits": Scheme(
        make=partial(gptq, bits=8, group=-1),
        config=GPTQ | {"bits": 8, "group_size": -1},
        format="q8",
    ),
    "gptq, 8 bits, zero points": Scheme(
        make=partial(gptq, bits=8, is_symmetric=False),
        config=GPTQ | {"bits": 8, "sym": False},
        format="q8_z",
    ),
    "awq": Scheme(make=awq, config=AWQ, format="q4_z"),
    "awq, group 64": Scheme(
        make=partial(awq, group=64), config=AWQ | {"group_size": 64}, format="q4_z"
    ),
    "awq, no zero points": Scheme(
        make=partial(awq, has_zeros=False), config=AWQ | {"zero_point": False}, format="q4_0"
    ),
    "packed int4": Scheme(
        make=pack_quantized,
        config=compressed("pack-quantized", strategy="group", group_size=32),
        format="q4_0",
    ),
    "packed int4, zero points": Scheme(
        make=partial(pack_quantized, is_symmetric=False, group=64),
        config=compressed("pack-quantized", strategy="group", group_size=64, symmetric=False),
        format="q4_z",
    ),
    "packed int4, act-order": Scheme(
        make=partial(pack_quantized, is_act_order=True),
        config=compressed("pack-quantized", strategy="group", group_size=32, actorder="group"),
        format="q8",
        most_error=0.008,
    ),
    "packed int8": Scheme(
        make=partial(pack_quantized, bits=8, group=-1),
        config=compressed("pack-quantized", num_bits=8, strategy="channel", group_size=None),
        format="q8",
    ),
    "int8": Scheme(
        make=int_quantized,
        config=compressed("int-quantized", num_bits=8, strategy="channel"),
        format="q8",
        most_error=5e-4,
    ),
    "int8, one scale": Scheme(
        make=partial(int_quantized, is_one=True),
        config=compressed("int-quantized", num_bits=8, strategy="tensor"),
        format="q8",
        most_error=5e-4,
    ),
    "int8, zero points": Scheme(
        make=partial(int_quantized, has_zeros=True),
        config=compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False),
        format="q8_z",
        most_error=5e-4,
    ),
    "fp8, blocks": Scheme(
        make=partial(fp8, block=(48, 32)),
        config=FP8 | {"weight_block_size": [48, 32]},
        format="q8",
        most_error=0.008,
    ),
    "fp8, large blocks": Scheme(
        make=partial(fp8, block=(48, 128)),
        config=FP8 | {"weight_block_size": [48, 128]},
        format="f8",
    ),
    "fp8, one scale": Scheme(
        make=partial(fp8, kind="tensor", scale_name="weight_scale"),
        config=FP8 | {"weight_block_size": None},
        format="f8",
    ),
    "compressed fp8": Scheme(
        make=partial(fp8, kind="channel", scale_name="weight_scale"),
        config=compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        format="f8",
    ),
}

"""Small models written to disk, sound or forged, for tests of the readers."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from safetensors.numpy import save_file

from tests.unit import tiny_tokenizers

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INNER = 40, 64, 2, 4, 2, 16, 96

HF_CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": INNER,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def canonical_shapes(is_tied: bool = False, has_bias: bool = False) -> dict[str, tuple[int, ...]]:
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (HIDDEN,),
        "q": (q, HIDDEN),
        "k": (kv, HIDDEN),
        "v": (kv, HIDDEN),
        "o": (HIDDEN, q),
        "ffn_norm": (HIDDEN,),
        "gate": (INNER, HIDDEN),
        "up": (INNER, HIDDEN),
        "down": (HIDDEN, INNER),
    }
    if has_bias:
        layer |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    shapes: dict[str, tuple[int, ...]] = {"embed": (VOCAB, HIDDEN), "final_norm": (HIDDEN,)}
    shapes |= {} if is_tied else {"lm_head": (VOCAB, HIDDEN)}
    return shapes | {f"layers.{i}.{n}": s for i in range(LAYERS) for n, s in layer.items()}


def random_weights(is_tied: bool = False, has_bias: bool = False) -> dict[str, np.ndarray]:
    shapes = canonical_shapes(is_tied, has_bias)
    return {name: random_floats(*s, seed=i) for i, (name, s) in enumerate(shapes.items())}


_GGUF_NAMES = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
}
_GGUF_PARTS = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
_GGUF_PARTS |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
_HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
_HF_PARTS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HF_PARTS |= {n: f"self_attn.{n}_proj" for n in "qkvo"}
_HF_PARTS |= {n: f"mlp.{n}_proj" for n in ("gate", "up", "down")}


def gguf_name(name: str) -> str:
    if name in _GGUF_NAMES:
        return _GGUF_NAMES[name]
    _, layer, part = name.split(".")
    kind = "bias" if part.endswith("_bias") else "weight"
    part = part.removesuffix("_bias")
    return f"blk.{layer}.{_GGUF_PARTS.get(part, part)}.{kind}"


def hf_name(name: str) -> str:
    if name in _HF_NAMES:
        return _HF_NAMES[name]
    _, layer, part = name.split(".")
    kind = "bias" if part.endswith("_bias") else "weight"
    part = part.removesuffix("_bias")
    return f"model.layers.{layer}.{_HF_PARTS[part]}.{kind}"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k of a llama model."""
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    weights: Mapping[str, np.ndarray],
    architecture: str = "llama",
    encodings: Mapping[str, GGMLQuantizationType] | None = None,
    changes: Mapping[str, object] | None = None,
) -> Path:
    """A GGUF file of canonical weights; `changes` adds or replaces metadata, None leaves it out."""
    writer = GGUFWriter(path, architecture)
    for key, value in (gguf_metadata(architecture) | dict(changes or {})).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_key_value(key, value, _value_type(value))
    for name, weight in weights.items():
        heads = {"q": HEADS, "k": KV_HEADS}.get(name.rpartition(".")[2].removesuffix("_bias"))
        if architecture == "llama" and heads is not None:
            weight = interleave(weight, heads)
        encoding = (encodings or {}).get(name, GGMLQuantizationType.F32)
        data = gguf.quants.quantize(weight, encoding)
        writer.add_tensor(gguf_name(name), data, raw_dtype=encoding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_metadata(architecture: str) -> dict[str, object]:
    a = architecture
    return {
        "general.name": "tiny",
        f"{a}.block_count": LAYERS,
        f"{a}.context_length": 128,
        f"{a}.embedding_length": HIDDEN,
        f"{a}.feed_forward_length": INNER,
        f"{a}.attention.head_count": HEADS,
        f"{a}.attention.head_count_kv": KV_HEADS,
        f"{a}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{a}.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": ["<|endoftext|>", "<s>", "<|im_end|>", "a", "é"],
        "tokenizer.ggml.token_type": [3, 3, 3, 1, 1],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def _value_type(value: object) -> GGUFValueType:
    return GGUFValueType.UINT32 if type(value) is int else GGUFValueType.get_type(value)


def write_hf_folder(
    folder: Path,
    weights: Mapping[str, np.ndarray],
    shards: int = 1,
    changes: Mapping[str, object] | None = None,
) -> Path:
    """A folder with config.json and safetensors, an index too if there are several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in (HF_CONFIG | dict(changes or {})).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {hf_name(name): weight for name, weight in weights.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[i::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# Pieces of a GGUF header, for files that no writer would write.


def gguf_string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def gguf_u32(key: str, value: int) -> bytes:
    return gguf_string(key) + struct.pack("<II", 4, value)


def gguf_tensor(name: str, sizes: Sequence[int] = (8,), type_id: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return gguf_string(name) + dimensions + struct.pack("<IQ", type_id, offset)


def gguf_bytes(
    metadata: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    num_metadata: int | None = None,
    num_tensors: int | None = None,
) -> bytes:
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(metadata) if num_metadata is None else num_metadata,
    )
    header = b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(metadata) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


def write_runnable_gguf(path: Path, changes: Mapping[str, object] | None = None) -> Path:
    """A tiny llama with random weights and a byte-level tokenizer: it loads, and says nonsense."""
    tokenizer = tiny_tokenizers.gguf_metadata()
    vocab_size = len(tokenizer["tokenizer.ggml.tokens"])
    weights = random_weights(is_tied=True)
    weights["embed"] = random_floats(vocab_size, HIDDEN, seed=99)
    return write_gguf(path, weights, changes=tokenizer | dict(changes or {}))

"""Encoders as GGUF files, written as llama.cpp's converter does it.

Names of tensors come from the `gguf` package, which is llama.cpp's own list.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from gguf import MODEL_ARCH, GGUFWriter, TokenType

MEAN, CLS, RANK = 1, 2, 4


def write_gguf(
    path: Path,
    model: Any,
    tokenizer: tokenizers.Tokenizer,
    *,
    arch: MODEL_ARCH = MODEL_ARCH.BERT,
    pooling: int = CLS,
    encoding: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """A model of transformers, its matrices in an encoding, and its tokenizer."""
    config = model.config
    offset = config.pad_token_id + 1 if "Roberta" in type(model).__name__ else 0
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings - offset)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType(pooling))
    writer.add_token_type_count(config.type_vocab_size)
    if rope := getattr(config, "rope_parameters", None):
        writer.add_rope_freq_base(rope["rope_theta"])
    write_tokenizer(writer, json.loads(tokenizer.to_str()))
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, array in tensors_of(model, offset).items():
        stem, _, kind = name.rpartition(".")
        target = names.get_name(stem)
        assert target is not None, name
        is_matrix = array.ndim == 2 and "position" not in name and "token_type" not in name
        kept = encoding if is_matrix else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(np.ascontiguousarray(array), kept)
        writer.add_tensor(f"{target}.{kind}", data, raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(model: Any, offset: int) -> dict[str, np.ndarray]:
    """In float32, under the names that the converter knows."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("bert.").removeprefix("roberta.")
        array = tensor.numpy().astype(np.float32)
        if name == "embeddings.position_embeddings.weight":
            array = array[offset:]
        if not name.startswith("pooler."):
            tensors[name] = array
    if "layers.0.self_attn.q_proj.weight" in tensors:
        tensors = dict(merged(tensors))
    return tensors


def merged(tensors: Mapping[str, np.ndarray]) -> Any:
    """Nomic's tensors as their own files have them."""
    renames = {
        "embeddings.LayerNorm": "emb_ln",
        "self_attn.o_proj": "attn.out_proj",
        "up_proj": "fc11",
        "gate_proj": "fc12",
        "down_proj": "fc2",
        "post_attention_layernorm": "norm1",
        "post_mlp_layernorm": "norm2",
    }
    for name, array in tensors.items():
        if ".q_proj" in name:
            parts = [tensors[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            name, array = name.replace("self_attn.q_proj", "attn.Wqkv"), np.concatenate(parts)
        elif ".k_proj" in name or ".v_proj" in name:
            continue
        for theirs, ours in renames.items():
            name = name.replace(theirs, ours)
        yield name.replace("layers.", "encoder.layers."), array


def write_tokenizer(writer: GGUFWriter, described: dict[str, Any]) -> None:
    """WordPiece or Unigram, from what tokenizer.json says."""
    model = described["model"]
    special = {t["content"] for t in described["added_tokens"] if t["special"]}
    if model["type"] == "WordPiece":
        tokens = sorted(model["vocab"], key=model["vocab"].get)
        writer.add_tokenizer_model("bert")
        writer.add_tokenizer_pre("default")
    else:
        tokens = [token for token, _ in model["vocab"]]
        writer.add_tokenizer_model("t5")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([score for _, score in model["vocab"]])
        writer.add_add_space_prefix(True)
        writer.add_remove_extra_whitespaces(True)
        if charsmap := charsmap_of(described["normalizer"]):
            writer.add_precompiled_charsmap(charsmap)
    kinds = [TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens]
    if model["type"] == "WordPiece":
        pairs = zip(tokens, kinds, strict=True)
        writer.add_token_list([phantom(token, kind) for token, kind in pairs])
    else:
        kinds[model["unk_id"]] = TokenType.UNKNOWN
        writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for role, add in (
        (("[CLS]", "<s>"), writer.add_bos_token_id),
        (("[SEP]", "</s>"), writer.add_eos_token_id),
        (("[SEP]", "</s>"), writer.add_sep_token_id),
        (("[UNK]", "<unk>"), writer.add_unk_token_id),
        (("[PAD]", "<pad>"), writer.add_pad_token_id),
    ):
        if found := [tokens.index(name) for name in role if name in tokens]:
            add(found[0])


def charsmap_of(normalizer: Any) -> bytes:
    steps = normalizer.get("normalizers", [normalizer])
    found = (s["precompiled_charsmap"] for s in steps if s["type"] == "Precompiled")
    return base64.b64decode(next(found, ""))


def phantom(token: str, kind: TokenType) -> str:
    """What begins a word is marked, not what goes on with one."""
    if kind == TokenType.CONTROL:
        return token
    return token[2:] if token.startswith("##") else f"\u2581{token}"

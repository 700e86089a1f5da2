"""Small tokenizers in the forms that models bring: GGUF metadata, and a folder of JSON files."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "1 3", "Ã ©", "e s"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_tokens() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def base_tokens() -> list[str]:
    return [*byte_tokens(), *(merge.replace(" ", "") for merge in MERGES)]


def gguf_metadata(pre: str = "smollm", **changes: Any) -> dict[str, Any]:
    """Byte-level metadata: 256 bytes, MERGES, SPECIAL, and `<tool>`, defined by a user."""
    tokens = [*base_tokens(), *SPECIAL, "<tool>"]
    types = [NORMAL] * len(base_tokens()) + [CONTROL] * len(SPECIAL) + [USER_DEFINED]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    changed = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: v for key, v in (metadata | changed).items() if v is not None}


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """SentencePiece metadata: <unk>, <s>, </s>, 256 bytes, letters, and some scored words."""
    words = {"▁": -9.0, "h": -8.0, "i": -8.0, "▁h": -2.0, "hi": -1.0, "▁hi": -3.0, "▁▁": -4.0}
    byte_names = [f"<0x{byte:02X}>" for byte in range(256)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *byte_names, *words],
        "tokenizer.ggml.token_type": [
            *(UNKNOWN, CONTROL, CONTROL),
            *([BYTE] * 256),
            *([NORMAL] * len(words)),
        ],
        "tokenizer.ggml.scores": [0.0] * 259 + list(words.values()),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    changed = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: v for key, v in (metadata | changed).items() if v is not None}


def qwen_like_backend() -> Tokenizer:
    """Built as Qwen2.5's tokenizer.json is: NFC, its pattern, added tokens after the base."""
    backend = qwen_base_backend()
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return backend


def qwen_base_backend() -> Tokenizer:
    """The same without the added tokens."""
    ids = {token: i for i, token in enumerate(base_tokens())}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    backend = Tokenizer(models.BPE(ids, merges))  # type: ignore[arg-type]
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def write_folder(folder: Path, **files: Any) -> Path:
    """A model's folder; `files` adds or replaces JSON files, by name without `.json`."""
    qwen_like_backend().save(str(folder / "tokenizer.json"))
    num_base = len(base_tokens())
    contents = {
        "tokenizer_config": {"eos_token": "<|im_end|>", "bos_token": None},
        "generation_config": {"eos_token_id": [num_base + 2, num_base]},
    }
    for name, content in (contents | files).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder

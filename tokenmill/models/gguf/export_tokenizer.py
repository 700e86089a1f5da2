"""The tokenizer of a folder as the metadata of a GGUF file: the way back of tokenizer.py.

Keys: github.com/ggml-org/ggml, docs/gguf.md. Byte-level BPE keeps its merges, and its pre-tokenizer
is known by how it cuts texts; SentencePiece BPE gets scores that put its merges in the same order.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.models.config import ModelConfig
from tokenmill.models.gguf.typed import Typed, string, u32
from tokenmill.models.gguf.vocabulary import KEYS, TokenType
from tokenmill.models.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from tokenmill.models.text.tokenizer import Tokenizer
from tokenmill.models.text.tokenizer_folder import load_tokenizer_folder

if TYPE_CHECKING:
    import tokenizers

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_PROBES = (
    "It's 1234567890 DON'T we'LL  they'Ve\n\n\n  x\t\ty \r\n z!?...  (a)/b\\c_d  ",
    "Ünïcödé naïve façade 東京は日本の首都 北京 서울 Москва Ελλάδα हिन्दी ไทย עברית العربية",
    "x1y22z333 4444 ٣٤٥٦ ①② ½ 3.14e-10 $100,000.00 50% #1 @user 🙂🚀👩‍👩‍👧 e\u0301 ﬁ",
    "camelCaseHTTPServer iPhoneX ABCdef ǅungla ʰa a\u0300b// \u00a0 \u3000 \u200b\n \n\t \n",
)
"""Texts that each row of PRE_TOKENIZERS cuts in its own way."""


def tokenizer_metadata(folder: Path, config: ModelConfig) -> dict[str, Typed]:
    """`tokenizer.*` of a folder. Raises UnsupportedModelError for a kind that GGUF cannot name."""
    tokenizer = load_tokenizer_folder(folder)
    spec = json.loads(tokenizer.to_json())
    model = spec["model"]
    if model.get("type") != "BPE":
        raise UnsupportedModelError(
            f"{folder}: the tokenizer's model is {model.get('type')!r}, supported is 'BPE'"
        )
    is_byte_level = not model.get("byte_fallback")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    found: dict[str, Typed] = {
        "model": string("gpt2" if is_byte_level else "llama"),
        **_vocabulary(folder, spec, config.vocab_size),
        **_roles(tokenizer, config),
    }
    if is_byte_level:
        pre = _pre_tokenizer(folder, tokenizer)
        found |= {"pre": string(pre), "merges": ("[STRING]", merges)}
    else:
        found["scores"] = ("[FLOAT32]", _scores(found["tokens"][1], merges))
        found["add_space_prefix"] = ("BOOL", _has_prefix(spec))
        found["pre"] = string("default")
    named = {KEYS + key: value for key, value in found.items()}
    return named | _templates(tokenizer)


def _vocabulary(where: Path, spec: Mapping[str, Any], num_rows: int) -> dict[str, Typed]:
    """Tokens and their types, filled up to the rows of the embedding."""
    model = spec["model"]
    tokens = {i: (token, _type(token, model)) for token, i in model["vocab"].items()}
    for added in spec["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if added["content"] == model.get("unk_token") and model.get("byte_fallback"):
            kind = TokenType.UNKNOWN
        tokens[added["id"]] = (added["content"], kind)
    if max(tokens) >= num_rows:
        raise ModelFileError(
            f"{where}: the tokenizer has {max(tokens) + 1} entries, the embedding {num_rows} rows"
        )
    rows = [tokens.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(num_rows)]
    return {
        "tokens": ("[STRING]", [token for token, _ in rows]),
        "token_type": ("[INT32]", [int(kind) for _, kind in rows]),
    }


def _type(token: str, model: Mapping[str, Any]) -> TokenType:
    is_byte = model.get("byte_fallback") and _BYTE.fullmatch(token)
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _roles(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Typed]:
    ends = [*config.eos_ids, *(i for i in tokenizer.eos_ids if i not in config.eos_ids)]
    bos = tokenizer.bos_id if tokenizer.bos_id is not None else config.bos_id
    ids = {"bos": bos, "eos": next(iter(ends), None)}
    ids["eot"] = ends[1] if len(ends) > 1 else None
    for name, key in (("unk_token", "unknown"), ("pad_token", "padding")):
        named = tokenizer.named_tokens.get(name)
        ids[key] = None if named is None else tokenizer.token_to_id(named)
    found = {f"{key}_token_id": u32(i) for key, i in ids.items() if i is not None}
    plain, around = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    has_bos = around[:1] == [bos] and around[:1] != plain[:1]
    has_eos = around[-1:] != plain[-1:] and any(around[-1:] == [end] for end in ends)
    return found | {"add_bos_token": ("BOOL", has_bos), "add_eos_token": ("BOOL", has_eos)}


def _templates(tokenizer: Tokenizer) -> dict[str, Typed]:
    base = "tokenizer.chat_template"
    found = {
        base if name == "default" else f"{base}.{name}": string(template)
        for name, template in tokenizer.chat_templates.items()
    }
    others = [name for name in tokenizer.chat_templates if name != "default"]
    return found | ({"tokenizer.chat_templates": ("[STRING]", others)} if others else {})


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Lower for a token that is merged later: llama.cpp makes the one of highest score first."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        ranks.setdefault(left + right, rank)
    return [float(-ranks[token]) if token in ranks else 0.0 for token in tokens]


def _has_prefix(spec: Mapping[str, Any]) -> bool:
    """Whether a text gets a space before it: by the normaliser, or by a Metaspace."""
    normalizer, cutter = (spec.get(key) or {} for key in ("normalizer", "pre_tokenizer"))
    steps = [normalizer, *normalizer.get("normalizers", [])]
    steps += [cutter, *cutter.get("pretokenizers", [])]
    return any(
        step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _pre_tokenizer(folder: Path, tokenizer: Tokenizer) -> str:
    """The first name in PRE_TOKENIZERS that cuts all probes as the folder's own does."""
    from tokenizers import Tokenizer as Backend

    own = Backend.from_str(tokenizer.to_json())
    takes_whole = bool(json.loads(tokenizer.to_json())["model"].get("ignore_merges"))
    wanted = [_cuts(own, text) for text in _PROBES]
    for name, row in PRE_TOKENIZERS.items():
        if row.ignore_merges == takes_whole and wanted == [_row_cuts(row, t) for t in _PROBES]:
            return name
    raise UnsupportedModelError(
        f"{folder}: the tokenizer cuts text as no pre-tokenizer does that GGUF files can name; "
        f"supported are {', '.join(sorted(PRE_TOKENIZERS))}"
    )


def _row_cuts(row: PreTokenizer, text: str) -> list[tuple[int, int]]:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in row.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    return _cuts(backend, text)


def _cuts(backend: "tokenizers.Tokenizer", text: str) -> list[tuple[int, int]]:
    cutter = backend.pre_tokenizer
    if cutter is None:
        return [(0, len(text))]
    return [place for _, place in cutter.pre_tokenize_str(text)]

"""How text is cut into words before byte-pair merging, by the name GGUF files give it.

The patterns are those of each model's own tokenizer.json; llama.cpp's `llama-vocab.cpp` says which
model goes by which name. Adding a name is adding a row.
"""

from dataclasses import dataclass

from tokenmill.errors import UnsupportedModelError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3 and Qwen2 differ in how many digits make a word.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# o200k and Tekken: a word ends where small letters are followed by capitals. They differ in
# contractions, which belong to the word before them or are words of their own, and in digits.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(contraction: str, digits: str) -> str:
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{contraction}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{contraction}"
        rf"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """Each pattern cuts what the patterns before it left: matches, and what lies between them.

    `has_nfc`: the text is first brought to Unicode form C. `ignore_merges`: a word which is a
    token is taken whole. `add_bos`: what holds where the file does not say.
    """

    patterns: tuple[str, ...]
    has_nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2_WORDS = PreTokenizer(patterns=(_GPT2,))
_SINGLE_DIGITS = PreTokenizer(patterns=(r"\p{N}", _GPT2))
_LLAMA3 = PreTokenizer(patterns=(_CL100K % "{1,3}",), ignore_merges=True, add_bos=True)
_TEKKEN = PreTokenizer(patterns=(_cased("", ""),), ignore_merges=True, add_bos=True)
_GPT4O = PreTokenizer(patterns=(_cased("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "{1,3}"),))
_QWEN2 = PreTokenizer(patterns=(_CL100K % "",), has_nfc=True)
# What llama.cpp does with a file that does not name its pre-tokenizer.
_DEFAULT = PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))

# Of several names for one row the first is written into files that we make.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": _DEFAULT,
    "gpt-2": _GPT2_WORDS,
    "phi-2": _GPT2_WORDS,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,  # a Llama
    "smaug-bpe": _LLAMA3,
    "dbrx": PreTokenizer(patterns=(_CL100K % "{1,3}",)),  # OLMo 2 and Phi-4
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,  # Mistral Nemo and later
    "gpt-4o": _GPT4O,  # Phi-4-mini
    "llama4": _GPT4O,
}


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """The row of that name. Raises UnsupportedModelError where there is none."""
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"pre-tokenizer {name!r} (tokenizer.ggml.pre) is not supported; supported are "
            f"{', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]

"""The tokenizer of a model, wherever its files keep it."""

from collections.abc import Mapping
from pathlib import Path

from tokenmill.models.gguf.tokenizer import load_gguf_tokenizer
from tokenmill.models.text.tokenizer import Tokenizer
from tokenmill.models.text.tokenizer_folder import load_tokenizer_folder


def load_tokenizer(source: Path | str | Mapping[str, object]) -> Tokenizer:
    """The tokenizer in a model's folder (tokenizer.json), or in the metadata of a GGUF file.

    Raises ModelFileError where it is missing or damaged, UnsupportedModelError where it is of a
    kind that we do not have.
    """
    if isinstance(source, Mapping):
        return load_gguf_tokenizer(source)
    return load_tokenizer_folder(Path(source))

"""The tokenizer in a model's folder, as Hugging Face lays it out."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.models.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

_OLD_FILES = ("tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer_folder(folder: Path) -> Tokenizer:
    """Read tokenizer.json and what lies around it: the names of special tokens, the chat
    templates, and the ids that end an answer.

    Raises ModelFileError for a missing or damaged file, UnsupportedModelError for a folder that
    has a tokenizer in another form.
    """
    config = _read_object(folder / "tokenizer_config.json")
    backend = _read_backend(folder)
    _add_missing_tokens(backend, config, folder)
    named = _named_tokens(config) or _named_tokens(_read_object(folder / "special_tokens_map.json"))
    bos_id = _find_id(backend, named, "bos_token", folder)
    eos_id = _find_id(backend, named, "eos_token", folder)
    return Tokenizer(
        backend,
        bos_id=bos_id,
        eos_ids=[*_generation_eos_ids(folder), *(() if eos_id is None else (eos_id,))],
        chat_templates=_read_templates(folder, config),
        named_tokens=named,
    )


def _read_backend(folder: Path) -> "tokenizers.Tokenizer":
    path = folder / "tokenizer.json"
    if not path.is_file():
        if old := [name for name in _OLD_FILES if (folder / name).is_file()]:
            raise UnsupportedModelError(
                f"{folder}: has {old[0]} but no tokenizer.json; save the tokenizer with "
                "transformers' save_pretrained to get one"
            )
        raise ModelFileError(f"{folder}: has no tokenizer.json; fetch the model again")
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelFileError(f"{path}: {error}; fetch the file again") from error


def _add_missing_tokens(
    backend: "tokenizers.Tokenizer", config: Mapping[str, Any], folder: Path
) -> None:
    """Add the tokens that only tokenizer_config.json knows, at the ids it gives them."""
    from tokenizers import AddedToken

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for token_id, entry in sorted(_added_entries(config, folder).items()):
        content = str(entry["content"])
        if backend.token_to_id(content) is not None:
            continue
        token = AddedToken(content, **{flag: bool(entry.get(flag, False)) for flag in flags})
        backend.add_tokens([token])
        if backend.token_to_id(content) != token_id:
            raise ModelFileError(
                f"{folder / 'tokenizer_config.json'}: added token {content!r} has id {token_id}, "
                f"but the next free one is {backend.token_to_id(content)}"
            )


def _added_entries(config: Mapping[str, Any], folder: Path) -> dict[int, Mapping[str, Any]]:
    entries = config.get("added_tokens_decoder", {})
    try:
        return {
            int(token_id): {**entry, "content": entry["content"]}
            for token_id, entry in entries.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        path = folder / "tokenizer_config.json"
        raise ModelFileError(f"{path}: added_tokens_decoder is malformed ({error!r})") from error


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Texts by name, such as bos_token; an entry is a text, or an object that has a content."""
    named = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            named[name] = text
    return named


def _find_id(
    backend: "tokenizers.Tokenizer", named: Mapping[str, str], name: str, folder: Path
) -> int | None:
    if name not in named:
        return None
    token_id = backend.token_to_id(named[name])
    if token_id is None:
        raise ModelFileError(
            f"{folder}: {name} is {named[name]!r}, which the vocabulary does not have; "
            "fetch the model again"
        )
    return token_id


def _generation_eos_ids(folder: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        found = _read_object(folder / name).get("eos_token_id")
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(token_id) is int for token_id in ids):
            raise ModelFileError(f"{folder / name}: eos_token_id is {found!r}, not token ids")
        return ids
    return []


def _read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; a file of its own comes before an entry of the configuration."""
    entry = _read_object(folder / "chat_template.json").get("chat_template")
    templates = dict(_template_entries(config.get("chat_template") if entry is None else entry))
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = _read_text(path)
    path = folder / "chat_template.jinja"
    if path.is_file():
        templates["default"] = _read_text(path)
    return templates


def _template_entries(entry: object) -> Iterator[tuple[str, str]]:
    if isinstance(entry, str):
        yield "default", entry
    elif isinstance(entry, list):
        for item in entry:
            if isinstance(item, dict) and isinstance(item.get("template"), str):
                yield str(item.get("name", "default")), item["template"]


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: is no valid JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: holds no JSON object; fetch the file again")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path}: is not UTF-8 ({error}); fetch the file again") from error
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error

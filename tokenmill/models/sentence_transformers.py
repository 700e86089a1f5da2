"""How a model's makers want its embeddings made: the files of the sentence-transformers library.

`modules.json` lists what follows one another: the model, pooling, perhaps linears and a norm.
`config_sentence_transformers.json` has the prompts that stand before texts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.models.config import ModelConfig
from tokenmill.models.dense import Dense, read_dense
from tokenmill.models.fields import Fields
from tokenmill.models.safetensors import read_json

_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}
_GGUF_TYPES = {1: "mean", 2: "cls", 3: "last"}
_KNOWN = ("Transformer", "Pooling", "Dense", "Dropout", "Normalize")
"""Modules, in the only order in which they may stand; Dropout was for training."""
_PROMPTS = "config_sentence_transformers.json"


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """`kind` is one of POOLINGS; `dense` are the linears that follow.

    `sizes` are the numbers of leading features that make a sensible embedding of their own
    (Matryoshka), () any number; None: only all of them do. `is_declared`: the files say so.
    """

    kind: str
    normalize: bool = True
    sizes: tuple[int, ...] | None = None
    max_length: int | None = None  # tokens of a text; None: as many as the model takes
    is_declared: bool = False
    dense: tuple[Dense, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)  # what stands before a text, by name
    default_prompt: str = ""  # what stands there where none is asked for


def read_pooling(
    path: Path, config: ModelConfig, metadata: Mapping[str, object] | None = None
) -> Pooling:
    """Of a model's folder, or of a GGUF file's metadata.

    Where they do not say: an encoder's first token, a decoder's last, normed. Raises
    ModelFileError, or UnsupportedModelError for modules that we do not have.
    """
    kind = "last" if config.encoder is None else "cls"
    if config.encoder is not None and config.encoder.num_labels:
        return Pooling(kind="cls", normalize=False, is_declared=True)
    if metadata is not None:
        number = metadata.get(f"{metadata.get('general.architecture')}.pooling_type")
        declared = _GGUF_TYPES.get(number) if isinstance(number, int) else None
        return Pooling(kind=declared or kind, is_declared=declared is not None)
    sizes = _sizes(Fields(str(path / "config.json"), read_json(path / "config.json")))
    if not (path / "modules.json").is_file():
        return Pooling(kind=kind, sizes=sizes)
    modules = _read_modules(path / "modules.json")
    prompts, default_prompt = _read_prompts(path / _PROMPTS)
    folders = [path / folder for module, folder in modules if module == "Pooling"]
    if folders:
        kind = _read_mode(folders[0] / "config.json", has_prompts=bool(prompts))
    return Pooling(
        kind=kind,
        normalize=any(module == "Normalize" for module, _ in modules),
        dense=_read_all_dense(path, modules, config.hidden_size),
        prompts=prompts,
        default_prompt=default_prompt,
        sizes=sizes,
        max_length=_read_max_length(path / "sentence_bert_config.json"),
        is_declared=True,
    )


def _sizes(fields: Fields) -> tuple[int, ...] | None:
    sizes = fields.values.get("matryoshka_dimensions")
    if sizes is None:
        return () if fields.flag("is_matryoshka", default=False) else None
    if not isinstance(sizes, list) or not all(type(n) is int and n > 0 for n in sizes):
        raise fields.wrong("matryoshka_dimensions", sizes, "a list of sizes")
    return tuple(sizes)


def _read_modules(path: Path) -> list[tuple[str, str]]:
    """The kind and the folder of each module."""
    try:
        listed = json.loads(path.read_bytes())
        modules = [(str(m["type"]).rpartition(".")[2], str(m["path"])) for m in listed]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelFileError(f"{path}: is no list of modules: {error!r}") from error
    for kind, folder in modules:
        if kind not in _KNOWN:
            known = ", ".join(_KNOWN)
            raise UnsupportedModelError(f"{path}: type is {kind!r}, supported are {known}")
        if ".." in Path(folder).parts or Path(folder).is_absolute():
            raise ModelFileError(f"{path}: path is {folder!r}, which lies outside the model")
    kinds = [kind for kind, _ in modules if kind != "Dropout"]
    if kinds != sorted(kinds, key=_KNOWN.index) or kinds.count("Pooling") > 1:
        raise UnsupportedModelError(
            f"{path}: modules are {', '.join(kinds)}, supported is one pooling, in the order "
            f"{', '.join(_KNOWN)}"
        )
    return modules


def _read_all_dense(
    path: Path, modules: Sequence[tuple[str, str]], num_features: int
) -> tuple[Dense, ...]:
    """Each linear reads what the one before it made."""
    found: list[Dense] = []
    for folder in (folder for kind, folder in modules if kind == "Dense"):
        found.append(read_dense(path / folder, found[-1].size if found else num_features))
    return tuple(found)


def _read_prompts(path: Path) -> tuple[Mapping[str, str], str]:
    """Prompts by name, and the one that is used where none is asked for."""
    if not path.is_file():
        return {}, ""
    fields = Fields(str(path), read_json(path))
    prompts = fields.values.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise fields.wrong("prompts", prompts, "an object of texts")
    name = fields.values.get("default_prompt_name")
    if name is not None and name not in prompts:
        raise fields.wrong("default_prompt_name", name, f"one of {', '.join(prompts) or 'none'}")
    return prompts, prompts.get(name, "")


def _read_mode(path: Path, *, has_prompts: bool) -> str:
    fields = Fields(str(path), read_json(path))
    if has_prompts:
        fields.require({"include_prompt": (True,)})
    if isinstance(mode := fields.values.get("pooling_mode"), str):
        modes = [mode.removesuffix("token").removesuffix("_tokens")]
    else:
        names = (n for n in fields.values if n.startswith("pooling_mode_"))
        modes = [_MODES.get(name, name) for name in names if fields.flag(name, default=False)]
    if len(modes) != 1 or modes[0] not in _MODES.values():
        known = ", ".join(_MODES)
        raise UnsupportedModelError(
            f"{path}: pooling is by {' and '.join(modes) or 'nothing'}, supported is one of {known}"
        )
    return modes[0]


def _read_max_length(path: Path) -> int | None:
    if not path.is_file():
        return None
    fields = Fields(str(path), read_json(path))
    fields.require({"do_lower_case": (False,)})
    if fields.values.get("max_seq_length") is None:
        return None
    return fields.integer("max_seq_length", most=2**30)

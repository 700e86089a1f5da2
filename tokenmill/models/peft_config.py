"""PEFT's adapter_config.json: what we compute with, and a refusal by name for everything else."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import TypeVar

from tokenmill.config import MAX_LORA_RANK
from tokenmill.models.fields import Fields

T = TypeVar("T")

CONFIG_NAME = "adapter_config.json"

_SUPPORTED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "use_dora": (False,),
    "use_qalora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "layer_replication": ([],),
    "layers_pattern": ([], "layers", ["layers"]),
    "megatron_config": ({},),
    "alora_invocation_tokens": ([],),
    # Others change the model's own weights before training, which a file of changes cannot tell.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
"""By key, the values that we compute with; null and an absent key are fine as well."""

_READ = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "layers_to_transform"),
)
_IGNORED = (
    *("arrow_config", "auto_mapping", "base_model_name_or_path", "corda_config"),
    *("ensure_weight_tying", "eva_config", "inference_mode", "loftq_config", "lora_dropout"),
    *("lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision"),
    "runtime_config",
)
"""Keys that concern training, or say where the adapter comes from."""

_SAFE_PATTERN = re.compile(r"[\w.\\^$]{1,256}")
"""Names of modules, dots perhaps escaped: expressions that cannot take long to match."""


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The part of a LoRA config that decides numbers. A module is named as in the model."""

    where: str
    rank: int
    alpha: float
    is_rank_stable: bool  # rsLoRA (Kalajdzievski 2023)
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: tuple[str, ...] | None  # ends of names of modules; None: what the file has
    layers: frozenset[int] | None  # None: all

    @property
    def max_rank(self) -> int:
        return max(self.rank, *self.rank_pattern.values(), 1)

    def rank_of(self, module: str) -> int:
        return _first_match(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) where the config says so."""
        rank = self.rank_of(module)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / sqrt(rank) if self.is_rank_stable else alpha / rank

    def expects(self, module: str, layer: int) -> bool:
        """Must the file hold a change of this module?"""
        if self.targets is None or (self.layers is not None and layer not in self.layers):
            return False
        return any(module == name or module.endswith(f".{name}") for name in self.targets)


def read_peft_config(where: str, values: Mapping[str, object]) -> PeftConfig:
    """Check and read a config. Raises UnsupportedModelError or ModelFileError, key and value."""
    fields = Fields(where, values)
    fields.require(_SUPPORTED)
    _refuse_unknown(fields)
    targets = _targets(fields)
    ranks, alphas = _pattern(fields, "rank_pattern"), _pattern(fields, "alpha_pattern")
    return PeftConfig(
        where=where,
        rank=fields.integer("r", most=MAX_LORA_RANK),
        alpha=fields.number("lora_alpha", most=1e9),
        is_rank_stable=fields.flag("use_rslora", default=False),
        rank_pattern={key: ranks.integer(key, most=MAX_LORA_RANK) for key in ranks.values},
        alpha_pattern={key: alphas.number(key, most=1e9) for key in alphas.values},
        targets=targets,
        layers=_layers(fields),
    )


def _refuse_unknown(fields: Fields) -> None:
    """A key of a later PEFT is fine as long as it asks for nothing."""
    for key, value in fields.values.items():
        is_known = key in _SUPPORTED or key in _READ or key in _IGNORED
        if not is_known and value not in (None, False, [], {}):
            raise fields.unsupported(key, value, "absence")


def _targets(fields: Fields) -> tuple[str, ...] | None:
    """The listed modules; where an expression or exclusions choose, the file itself tells."""
    value = fields.values.get("target_modules")
    if value is None or isinstance(value, str) or fields.values.get("exclude_modules"):
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise fields.wrong("target_modules", value, "a list of names of modules, or a string")
    return tuple(value)


def _layers(fields: Fields) -> frozenset[int] | None:
    value = fields.values.get("layers_to_transform")
    if value is None:
        return None
    listed = value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in listed):
        raise fields.wrong("layers_to_transform", value, "numbers of layers")
    return frozenset(listed)


def _pattern(fields: Fields, key: str) -> Fields:
    value = fields.values.get(key) or {}
    if not isinstance(value, dict):
        raise fields.wrong(key, value, "an object")
    for name in value:
        if not _SAFE_PATTERN.fullmatch(name):
            raise fields.unsupported(key, name, "names of modules, joined by dots")
        try:
            re.compile(name)
        except re.error:
            raise fields.wrong(key, name, "a name of a module") from None
    return Fields(f"{fields.where}: {key}", value)


def _first_match(patterns: Mapping[str, T], module: str, default: T) -> T:
    """As PEFT does: the first key that is the module's name or, behind a dot, ends it."""
    for key, value in patterns.items():
        if re.fullmatch(rf"(?:.*\.)?(?:{key})", module):
            return value
    return default

"""What a quantised checkpoint wants to be done to activations and caches, which it does not get.

Weights are a file's business, and are taken as they are. How activations and the KV cache are
rounded is said by --activations and --kv-cache alone, so that what else was meant must be told.
"""

from collections.abc import Iterator, Mapping

from tokenmill.models.fields import Fields

_FP8_METHODS = ("fp8", "fbgemm_fp8")


def left_out(fields: Fields) -> list[str]:
    """A sentence for each thing that a quantization_config asks for and that is not done."""
    notes = []
    if asked := sorted({_describe(scheme) for scheme in _activations(fields)}):
        kinds = " and ".join(asked)
        notes.append(f"{fields.where} rounds activations to {kinds}; here --activations says how")
    cache = fields.values.get("kv_cache_scheme")
    if isinstance(cache, Mapping):
        kind = _describe(cache)
        notes.append(f"{fields.where} rounds the KV cache to {kind}; here --kv-cache says how")
    return notes


def _activations(fields: Fields) -> Iterator[Mapping[str, object]]:
    if fields.values.get("quant_method") in _FP8_METHODS:
        is_static = fields.values.get("activation_scheme") == "static"
        yield {"type": "float", "num_bits": 8, "dynamic": not is_static}
    groups = fields.values.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        scheme = group.get("input_activations") if isinstance(group, Mapping) else None
        if isinstance(scheme, Mapping):
            yield scheme


def _describe(scheme: Mapping[str, object]) -> str:
    kind = "fp" if scheme.get("type") == "float" else "int"
    scales = "dynamic" if scheme.get("dynamic") else "static"
    by = f" by {scheme['strategy']}" if scheme.get("strategy") else ""
    return f"{kind}{scheme.get('num_bits', '?')} ({scales} scales{by})"

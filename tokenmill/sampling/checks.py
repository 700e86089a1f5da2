"""Checks of single fields of a request. Each raises UsageError: field, value, what is allowed."""

from collections.abc import Mapping, Sequence

from tokenmill.errors import UsageError

_LONGEST_SHOWN = 100
_BIAS_RANGE = (-100.0, 100.0)


def check_float(name: str, value: object, least: float, greatest: float) -> None:
    if _is_number(value) and least <= value <= greatest:  # type: ignore[operator]
        return  # a NaN fails both comparisons
    raise UsageError(
        f"{name} is {_shown(value)}, but must be a number from {least:g} to {greatest:g}"
    )


def check_int(
    name: str, value: object, lowest: int, highest: int, *, is_optional: bool = False
) -> None:
    if value is None and is_optional:
        return
    if not _is_int(value) or not lowest <= value <= highest:  # type: ignore[operator]
        or_none = ", or None" if is_optional else ""
        raise UsageError(
            f"{name} is {_shown(value)}, but must be a whole number from {lowest} to "
            f"{highest}{or_none}"
        )


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {_shown(value)}, but must be True or False")


def checked_strings(name: str, value: object) -> tuple[str, ...]:
    """A string or several, as a tuple."""
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) and s for s in strings):
        raise UsageError(
            f"{name} is {_shown(value)}, but must be a string or a list of strings, none empty"
        )
    return tuple(strings)


def checked_token_ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or not all(_is_int(t) and t >= 0 for t in value):
        raise UsageError(f"{name} is {_shown(value)}, but must be a list of token ids")
    return tuple(value)


def checked_biases(value: object) -> dict[int, float]:
    """The biases by token id."""
    least, greatest = _BIAS_RANGE
    if not isinstance(value, Mapping) or not all(
        _is_int(token) and token >= 0 and _is_number(bias) and least <= bias <= greatest
        for token, bias in value.items()
    ):
        raise UsageError(
            f"logit_bias is {_shown(value)}, but must be a map of token ids to numbers from "
            f"{least:g} to {greatest:g}"
        )
    return dict(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

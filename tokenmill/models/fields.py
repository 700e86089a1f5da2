"""Typed access to what was read from a file that anybody may have written."""

from collections.abc import Mapping

from tokenmill.errors import ModelFileError, UnsupportedModelError

_NO_TOKEN = 2**32 - 1  # how some converters write "no such token"


class Fields:
    """A mapping out of a file, read key by key; errors name `where`, the key and its value."""

    def __init__(self, where: str, values: Mapping[str, object]) -> None:
        self.where = where
        self.values = values

    def _present(self, key: str, default: object) -> object:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelFileError(f"{self.where}: {key} is missing")
        return value

    def integer(self, key: str, *, most: int, least: int = 1, default: int | None = None) -> int:
        value = self._present(key, default)
        if isinstance(value, list):
            raise UnsupportedModelError(
                f"{self.where}: {key} differs from layer to layer; supported is one value for all"
            )
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(key, value, f"an integer from {least} to {most}")
        return value

    def number(self, key: str, *, most: float, default: float | None = None) -> float:
        value = self._present(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            raise self.wrong(key, value, f"a number above 0, at most {most:g}")
        return float(value)

    def numbers(self, key: str, count: int) -> list[float]:
        """A list of `count` numbers above 0."""
        value = self._present(key, None)
        if not isinstance(value, list) or len(value) != count:
            raise self.wrong(key, value, f"a list of {count} numbers")
        return [Fields(self.where, {key: item}).number(key, most=1e9) for item in value]

    def flag(self, key: str, default: bool) -> bool:
        value = self._present(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._present(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a string")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """An id, a list of ids, or none."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value in (None, _NO_TOKEN) else [value]
        for i in ids:
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size:
                raise self.wrong(key, i, f"a token id below {vocab_size}")
        return tuple(ids)

    def require(self, supported: Mapping[str, tuple[object, ...]]) -> None:
        """Refuse keys whose value is none of those we compute with; an absent key is fine."""
        for key, allowed in supported.items():
            value = self.values.get(key)
            if value is not None and value not in allowed:
                raise self.unsupported(key, value, " or ".join(map(_show, allowed)) or "absence")

    def wrong(self, key: str, value: object, expected: str) -> ModelFileError:
        return ModelFileError(f"{self.where}: {key} is {_show(value)}, expected {expected}")

    def unsupported(self, key: str, value: object, supported: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.where}: {key} is {_show(value)}, supported is {supported}"
        )


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

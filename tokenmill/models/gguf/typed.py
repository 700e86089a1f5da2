"""GGUF metadata on its way into a file: values with their types."""

from typing import Any

Typed = tuple[str, Any]
"""A type as `gguf.GGUFValueType` names it, in brackets that of a list's items; and the value."""


def string(value: str) -> Typed:
    return ("STRING", value)


def u32(value: int) -> Typed:
    return ("UINT32", value)


def f32(value: float) -> Typed:
    return ("FLOAT32", value)

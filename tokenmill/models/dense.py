"""Linears behind the pooling, as sentence-transformers keeps them: a folder of their own each.

They are computed text by text, in float32: an embedding's bits do not depend on its company.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.ir import numerics
from tokenmill.ir.order import F32Array
from tokenmill.models.encodings import FLOAT_ENCODINGS
from tokenmill.models.fields import Fields
from tokenmill.models.mapped import MappedTensor
from tokenmill.models.safetensors import read_json, read_safetensors_file
from tokenmill.models.weights import decode

_WEIGHTS = "model.safetensors"
_LARGEST = 2**16


def _same(x: F32Array) -> F32Array:
    return x


def _relu(x: F32Array) -> F32Array:
    return np.maximum(x, np.float32(0))


def _tanh(x: F32Array) -> F32Array:
    out: F32Array = np.tanh(x)
    return out


_ACTIVATIONS: Mapping[str, Callable[[F32Array], F32Array]] = {
    "GELU": numerics.gelu_erf,
    "Identity": _same,
    "ReLU": _relu,
    "SiLU": numerics.silu,
    "Tanh": _tanh,
}
"""By the last part of a class name of torch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dense:
    """bend(W x + b). N outputs, K inputs."""

    weight_NK: F32Array
    bias_N: F32Array | None
    activation: str

    @property
    def size(self) -> int:
        return len(self.weight_NK)

    def __call__(self, x_K: F32Array) -> F32Array:
        out: F32Array = self.weight_NK @ x_K
        return _ACTIVATIONS[self.activation](out if self.bias_N is None else out + self.bias_N)


def read_dense(folder: Path, num_inputs: int) -> Dense:
    """One module, for vectors of `num_inputs` features. Raises the TokenmillError that says why."""
    fields = Fields(str(folder / "config.json"), read_json(folder / "config.json"))
    fields.require({"in_features": (num_inputs,)})
    size = fields.integer("out_features", most=_LARGEST)
    name = fields.text("activation_function", default="torch.nn.modules.activation.Tanh")
    activation = name.rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise fields.unsupported("activation_function", name, " or ".join(_ACTIVATIONS))
    tensors = _tensors(folder)
    has_bias = fields.flag("bias", default=True)
    bias = _floats(folder, tensors, "linear.bias", (size,)) if has_bias else None
    return Dense(
        weight_NK=_floats(folder, tensors, "linear.weight", (size, num_inputs)),
        bias_N=bias,
        activation=activation,
    )


def _tensors(folder: Path) -> Mapping[str, MappedTensor]:
    if (folder / _WEIGHTS).is_file():
        return read_safetensors_file(folder / _WEIGHTS)
    if any(folder.glob("*.bin")):
        raise UnsupportedModelError(
            f"{folder}: has pickled weights only, which may run code when they are read: save the "
            f"module as {_WEIGHTS}"
        )
    raise ModelFileError(f"{folder}: has no {_WEIGHTS}; fetch the model again")


def _floats(
    folder: Path, tensors: Mapping[str, MappedTensor], name: str, shape: tuple[int, ...]
) -> F32Array:
    where = folder / _WEIGHTS
    if name not in tensors:
        raise ModelFileError(f"{where}: lacks {name!r}; fetch the model again")
    info = tensors[name].info
    if info.shape != shape or info.encoding not in FLOAT_ENCODINGS:
        raise ModelFileError(
            f"{where}: {name} has shape {list(info.shape)} of {info.encoding}, expected "
            f"{list(shape)} of {' or '.join(FLOAT_ENCODINGS)}"
        )
    quants = decode(tensors[name].read(name), "f32")[0].quants
    return np.ascontiguousarray(quants, np.float32).reshape(shape)

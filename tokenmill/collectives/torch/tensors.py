"""Tensors as arrays that share their memory."""

import ml_dtypes
import torch

from tokenmill.collectives.arithmetic import Array
from tokenmill.errors import UsageError


def as_array(tensor: torch.Tensor) -> Array:
    """The elements of a tensor on the CPU, as an array over the same memory. Raises UsageError."""
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        raise UsageError(
            f"a tensor is on {tensor.device}, but this backend serves the CPU: use nccl there"
        )
    if tensor.dtype == torch.bfloat16:
        array: Array = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array
    if tensor.dtype == torch.bool:
        return tensor.view(torch.uint8).numpy()
    return tensor.numpy()


def as_movable(tensor: torch.Tensor) -> Array:
    """The same for operations that only move elements: bytes, where the type is not one of ours."""
    if tensor.dtype in _OWN:
        return as_array(tensor)
    if not tensor.is_contiguous():
        raise UsageError(f"a tensor of {tensor.dtype} must be contiguous to travel")
    return as_array(tensor.detach().reshape(-1).view(torch.uint8))


_OWN = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool),
)

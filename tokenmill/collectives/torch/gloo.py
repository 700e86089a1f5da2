"""The same operations by gloo, to compare with."""

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from tokenmill.collectives.arithmetic import DataType
from tokenmill.collectives.measure import sample

_TYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i8": torch.int8,
    "i32": torch.int32,
    "i64": torch.int64,
    "u8": torch.uint8,
}


def join_gloo(path: str, rank: int, size: int, timeout_s: float) -> None:
    """Meet over a file that nobody else uses."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )


def make_gloo_call(
    op: str, count: int, dtype: DataType, rank: int, size: int
) -> Callable[[], object]:
    """A function that does the operation once."""
    data = torch.from_numpy(sample(rank, count, dtype).astype("f8")).to(_TYPES[dtype.name])
    part = data[: count // size].clone()
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(data),
        "reduce": lambda: dist.reduce(data, 0),
        "broadcast": lambda: dist.broadcast(data, 0),
        "all_gather": lambda: dist.all_gather_into_tensor(data, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, data),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(data), data),
    }
    return calls[op]

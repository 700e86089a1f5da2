"""A communication hook for DistributedDataParallel: gradients by a communicator of one's choice.

    ranks = tokenmill.collectives.connect("10.0.0.1:29501", rank=rank, size=size)
    model.register_comm_hook(HookState(ranks, is_ordered=True), all_reduce_hook)

It works whatever the backend of the process group is. `is_ordered` gives gradients whose bits do
not depend on how they are cut into buckets; `is_compressed` sends f32 as bf16.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tokenmill.collectives.communicator import Communicator
from tokenmill.collectives.torch.tensors import as_array
from tokenmill.collectives.torch.works import TorchWork


@dataclass(frozen=True)
class HookState:
    """How gradients are averaged."""

    communicator: Communicator
    algorithm: str | None = None
    is_ordered: bool = False
    is_compressed: bool = False


def all_reduce_hook(
    state: HookState, bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of gradients over all ranks; each is divided first, as DDP does."""
    ranks, gradients = state.communicator, bucket.buffer()
    gradients.div_(ranks.size)
    sent = gradients.to(torch.bfloat16) if state.is_compressed else gradients
    work = ranks.all_reduce(
        as_array(sent), algorithm=state.algorithm, is_ordered=state.is_ordered, is_async=True
    )

    def take(future: Any) -> torch.Tensor:
        future.value()  # raises what went wrong
        return gradients.copy_(sent) if state.is_compressed else gradients

    return TorchWork([work], [gradients]).get_future().then(take)

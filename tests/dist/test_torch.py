"""The backend of torch.distributed and the DDP hook, held against gloo."""

import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
import torch.distributed._functional_collectives as functional  # noqa: E402
from torch.distributed.tensor import (  # noqa: E402
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

import tokenmill.collectives.torch.backend  # noqa: E402, F401
from tests.dist.processes import free_port, segments  # noqa: E402
from tokenmill.collectives.connect import connect  # noqa: E402
from tokenmill.collectives.torch.ddp_hook import HookState, all_reduce_hook  # noqa: E402

STEPS = 12


def train(rank: int, size: int, port: int, hook_port: int, folder: Path) -> None:
    """The same model with gloo, with tokenmill, and with gloo and the hook."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    found = {"gloo": train_one(None)}
    with connect(f"127.0.0.1:{hook_port}", rank=rank, size=size, timeout_s=30) as ranks:
        found["hook"] = train_one(HookState(ranks))
        found["compressed"] = train_one(HookState(ranks, is_compressed=True))
    dist.barrier()
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port + 1)
    dist.init_process_group("tokenmill", rank=rank, world_size=size)
    found["tokenmill"] = train_one(None)
    use_operations(rank, size)
    dist.destroy_process_group()
    if rank == 0:
        torch.save(found, folder / "found.pt")


def train_one(hook: HookState | None) -> list["torch.Tensor"]:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 4)
    )
    model = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.005)
    if hook:
        model.register_comm_hook(hook, all_reduce_hook)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        x = torch.randn(8, 16, generator=data)
        y = torch.randint(4, (8,), generator=data)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def use_operations(rank: int, size: int) -> None:
    """Functional collectives, DTensor, groups, objects, lists, messages."""
    world = dist.group.WORLD
    total = functional.wait_tensor(functional.all_reduce(torch.ones(5), "sum", world))
    assert torch.equal(total, torch.full((5,), float(size)))
    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(16.0 * size).reshape(2 * size, 8)
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    assert torch.equal(sharded.redistribute(mesh, [Shard(1)]).full_tensor(), whole)
    partial = distribute_tensor(torch.eye(8), mesh, [Replicate()])
    assert torch.equal((sharded @ partial).full_tensor(), whole)
    objects: list[object] = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": r} for r in range(size)]
    shorts = [torch.zeros(3, dtype=torch.int16) for _ in range(size)]
    dist.all_gather(shorts, torch.full((3,), rank, dtype=torch.int16))
    assert [int(t[0]) for t in shorts] == list(range(size))
    mine = torch.zeros(2)
    parts = [torch.full((2,), float(r)) for r in range(size)]
    dist.scatter(mine, parts if rank == 0 else None, src=0)
    assert torch.equal(mine, parts[rank])
    blocks = torch.empty(size)
    dist.all_to_all_single(blocks, torch.arange(float(size)) + 10 * rank)
    assert blocks.tolist() == [10.0 * r + rank for r in range(size)]
    got, large = torch.empty(1 << 18), torch.full((1 << 18,), float(rank))
    ahead, behind = (rank + 1) % size, (rank - 1) % size
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, large, ahead), dist.P2POp(dist.irecv, got, behind)]
    )
    for work in works:
        work.wait()
    assert float(got[-1]) == behind
    pair = dist.new_group([0, 1])
    if rank < 2:
        value = torch.tensor([2.0], dtype=torch.bfloat16)
        dist.all_reduce(value, group=pair)
        assert float(value) == 4
    dist.barrier()


def farthest(one, other) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("size", [2, 4])
def test_data_parallel_training(size, tmp_path):
    arguments = (size, free_port(), free_port(), tmp_path)
    torch.multiprocessing.spawn(train, arguments, nprocs=size)
    found = torch.load(tmp_path / "found.pt")
    limit = 0.0 if size == 2 else 1e-6
    assert farthest(found["tokenmill"], found["gloo"]) <= limit
    assert farthest(found["hook"], found["gloo"]) <= limit
    assert 0 < farthest(found["compressed"], found["gloo"]) < 0.05
    assert not segments()

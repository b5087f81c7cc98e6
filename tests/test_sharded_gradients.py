"""Gramian and combination of gradients whose parts two processes hold, in every mixture of placements."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from vgs_kernels import combine_gradients, gradient_gramian

PROCESSES = 2


def gradients() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 5), (7,), (4, 3), (5,), (2, 8))
    first, second = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    return first, second


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    line = init_device_mesh("cpu", (PROCESSES,))
    plane = init_device_mesh("cpu", (PROCESSES, 1), mesh_dim_names=("data", "tensor"))  # FSDP with tensor parallelism
    turned = init_device_mesh("cpu", (1, PROCESSES), mesh_dim_names=("data", "tensor"))
    placed = [
        (line, [Shard(0)]),
        (line, [Replicate()]),
        (plane, [Shard(0), Shard(1)]),
        (plane, [Shard(0), Replicate()]),
        (turned, [Replicate(), Shard(1)]),
    ]
    first, second = gradients()
    whole = gradient_gramian(first, second)
    sharded = [
        [distribute_tensor(g, mesh, placements) for g, (mesh, placements) in zip(list_, placed, strict=True)]
        for list_ in (first, second)
    ]
    torch.testing.assert_close(gradient_gramian(*sharded), whole)
    # A plain tensor beside them is whole on every process, and counted once.
    mixed = [[*shards[:2], *list_[2:]] for shards, list_ in zip(sharded, (first, second), strict=True)]
    torch.testing.assert_close(gradient_gramian(*mixed), whole)
    # Plain tensors of which each process holds its own part.
    parts = [[g.chunk(PROCESSES)[rank] for g in (list_[0], list_[2])] for list_ in (first, second)]
    expected = gradient_gramian([first[0], first[2]], [second[0], second[2]])
    torch.testing.assert_close(gradient_gramian(*parts, process_group=dist.group.WORLD), expected)
    # DTensors say themselves who holds what: the group is for plain tensors.
    torch.testing.assert_close(gradient_gramian(*sharded, process_group=dist.group.WORLD), whole)

    weights = torch.tensor([0.3, -0.7])
    plain_out = [torch.empty_like(g) for g in first]
    plain_norm = combine_gradients(first, second, weights, out=plain_out, max_norm=0.5)
    norm = combine_gradients(*sharded, weights, out=sharded[0], max_norm=0.5)
    torch.testing.assert_close(norm, plain_norm)
    for got, wanted in zip(sharded[0], plain_out, strict=True):
        torch.testing.assert_close(got.full_tensor(), wanted)
    (Path(folder) / f"passed{rank}").touch()
    dist.destroy_process_group()


def test_every_mixture_of_placements_gives_the_gramian_of_the_whole(tmp_path: Path) -> None:
    multiprocessing.spawn(worker, (str(tmp_path),), nprocs=PROCESSES)
    assert all((tmp_path / f"passed{rank}").exists() for rank in range(PROCESSES))

"""Where the teacher is put: on the device of its process, whole or as a shard; on another; and what does not go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from vgs_distill import VGSConfig
from vgs_distill.errors import InputError
from vgs_distill.models.teacher import place_teacher

from tests.small_run import ON_CPU, build_student


def accelerator(kind: DistributedType, processes: int = 2, device: str = "meta") -> Any:
    """The part of accelerate's that says where a model goes; `meta` stands in for a GPU."""
    return SimpleNamespace(distributed_type=kind, num_processes=processes, device=torch.device(device))


@pytest.mark.parametrize("tied", [False, True])
def test_under_fsdp_the_teacher_is_moved_to_the_device_of_its_process(processor: Any, tied: bool) -> None:
    teacher = place_teacher(
        build_student(processor, 2, tied=tied), accelerator(DistributedType.FSDP), None, "replicate"
    )
    assert {tensor.device.type for tensor in [*teacher.parameters(), *teacher.buffers()]} == {"meta"}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training


@pytest.mark.parametrize(
    ("kind", "processes"), [(DistributedType.NO, 1), (DistributedType.FSDP, 1), (DistributedType.DEEPSPEED, 2)]
)
def test_a_teacher_is_split_only_between_processes(processor: Any, kind: DistributedType, processes: int) -> None:
    with pytest.raises(InputError, match="splits the teacher between several processes under DDP or FSDP2; leave it"):
        place_teacher(build_student(processor, 2), accelerator(kind, processes), None, "shard")


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_another_device_is_not_for_launchers_that_place_the_teacher(processor: Any, kind: DistributedType) -> None:
    with pytest.raises(InputError, match="does not go with FSDP or DeepSpeed, which place the teacher themselves"):
        place_teacher(build_student(processor, 2), accelerator(kind), "cpu", "replicate")


def test_processes_do_not_share_one_other_device(processor: Any) -> None:
    with pytest.raises(InputError, match="where each of 2 processes would put a teacher of its own"):
        place_teacher(build_student(processor, 2), accelerator(DistributedType.MULTI_GPU), "cuda:1", "replicate")


def test_settings_that_put_the_teacher_in_two_places_are_refused() -> None:
    with pytest.raises(ValueError, match="keeps a part of the teacher beside every student"):
        VGSConfig(**ON_CPU, teacher_sharding="shard", teacher_device="offload")
    with pytest.raises(ValueError, match="unknown teacher_sharding 'half'; choose one of replicate, shard"):
        VGSConfig(**ON_CPU, teacher_sharding="half")

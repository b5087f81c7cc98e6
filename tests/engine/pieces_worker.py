"""One of two processes: `DecomposedLoss` and `Steering` under DDP and FSDP2 against plain torch on the whole batch.

torchrun --nproc-per-node 2 tests/engine/pieces_worker.py
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from vgs_distill import DecomposedLoss, MethodSettings, Steering, View
from vgs_distill.demo.models import build_processor
from vgs_distill.demo.worlds import make_world
from vgs_distill.errors import TrainingStopped

from tests.small_run import build_student
from vgs_kernels import VisualGradientSteering

ROWS, LENGTH, MASKED, COUNTED = 8, 12, 9, 4
POLICY = VisualGradientSteering(2.0)


def view(ids: Tensor) -> View:
    labels = ids.clone()
    labels[:, :-COUNTED] = -100
    return View.of({"input_ids": ids, "labels": labels})


def textbook(student: Any, teacher: Any, seen: Tensor, masked: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Gramian and steered gradient of the whole batch, from full logits by autograd."""
    predicts = slice(-COUNTED - 1, -1)
    p = student(seen).logits[:, predicts].log_softmax(-1)
    with torch.no_grad():
        p0, q = student(masked).logits[:, predicts].log_softmax(-1), teacher(seen).logits[:, predicts].log_softmax(-1)
        target = (p0 + q - teacher(masked).logits[:, predicts].log_softmax(-1)).log_softmax(-1)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    grads = [
        torch.autograd.grad((p.exp() * (p - other)).sum(-1).mean(), parameters, retain_graph=True, allow_unused=True)
        for other in (q, target)
    ]
    first, second = (
        [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grad, strict=True)] for grad in grads
    )
    rows = torch.stack([torch.cat([g.flatten() for g in part]) for part in (first, second)])
    gramian = rows @ rows.T
    weights = POLICY(gramian)
    return gramian, [weights[0] * a + weights[1] * b for a, b in zip(first, second, strict=True)]


def compare(rank: int) -> None:
    processor = build_processor(make_world("shapes").words)
    teacher = build_student(processor, 2, 48).eval()
    reference = build_student(processor, 1)
    torch.manual_seed(3)
    words = len(processor.tokenizer) - 8  # the last ones stand for images
    seen = torch.randint(8, words, (ROWS, LENGTH))
    masked = seen[:, LENGTH - MASKED :]
    gramian, expected = textbook(reference, teacher, seen, masked)
    loss = DecomposedLoss(MethodSettings(language_preservation=0))
    for mode in ("ddp", "fsdp2"):
        student: Any = build_student(processor, 1)
        for layer in student.model.language_model.layers if mode == "fsdp2" else ():
            fully_shard(layer)
        wrapped = DistributedDataParallel(student) if mode == "ddp" else fully_shard(student)
        steering = Steering(student.parameters(), POLICY, check_processes=True)
        own = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        for rows in (seen[own][:2], seen[own][2:]):  # two micro-batches
            views = view(rows), view(rows[:, LENGTH - MASKED :])
            with steering.micro_batch(wrapped):
                (only,) = loss.views(wrapped, teacher, *views, ROWS * COUNTED / 2)
                steering.backward(only.parts[0], only.parts[1])
        record = steering.finish()
        assert record is not None
        torch.testing.assert_close(record.gramian, gramian, atol=1e-6, rtol=1e-4)
        for parameter, gradient in zip(student.parameters(), expected, strict=True):
            if parameter.grad is not None:
                found = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-4)
        if rank == 0:
            print(mode, flush=True)
    steering = Steering(reference.parameters(), POLICY, check_processes=True)  # no wrapper: nothing is averaged
    with steering.micro_batch(reference):
        (only,) = loss.views(reference, teacher, view(seen[own]), view(masked[own]), ROWS * COUNTED / 2)
        steering.backward(only.parts[0], only.parts[1])
    try:
        steering.finish()
    except TrainingStopped:
        if rank == 0:
            print("refused", flush=True)


def main() -> None:
    dist.init_process_group("gloo")
    compare(dist.get_rank())  # its models are gone before the group is: a thread that frees one at exit aborts
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

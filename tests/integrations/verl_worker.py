"""One process of verl's FSDP2 engine with this project's, two micro-batches a step; prints EQUAL where it is right.

python tests/integrations/verl_worker.py MODELS     or by torchrun; MODELS: of `tiny_models.py --short`
"""

from __future__ import annotations

import os
import sys
from typing import Any

MODELS = sys.argv[1]
os.environ |= {
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cpu",
    "VERL_ENGINE_VENDOR": "vgs",
    "VERL_USE_EXTERNAL_MODULES": "tests.integrations.verl_cpu,vgs_distill.integrations.verl_plugin",
    "VGS_TEACHER": f"{MODELS}/qwen3_vl-teacher",
    "VGS_SETTINGS": '{"method": "vgs", "eta": "measured", "language_preservation": 0}',
}
for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
    os.environ.setdefault(name, value)
os.environ.setdefault("MASTER_PORT", "29617")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import verl  # noqa: E402, F401 - the platform and the engine register themselves
from PIL import Image  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from transformers import AutoModelForImageTextToText  # noqa: E402
from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig  # noqa: E402
from verl.workers.engine_workers import TrainingWorker  # noqa: E402

from vgs_kernels import VisualGradientSteering  # noqa: E402

ROWS = 4  # of a process
POLICY = VisualGradientSteering(2.0)


def worker() -> Any:
    fp32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    model = HFModelConfig(
        path=f"{MODELS}/qwen3_vl-student", override_config={"attn_implementation": "sdpa"}, use_remove_padding=False,
        enable_gradient_checkpointing=False,
    )  # fmt: skip
    engine = FSDPEngineConfig(
        strategy="fsdp2", use_dynamic_bsz=False, micro_batch_size_per_gpu=2, use_remove_padding=False,
        use_torch_compile=False, mixed_precision=fp32,
    )  # fmt: skip
    made = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model", model_config=model, engine_config=engine,
            optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10, clip_grad=1e9),
            checkpoint_config=CheckpointConfig(),
        )
    )  # fmt: skip
    made.set_loss_fn(lambda **_: None)
    made.reset()
    return made


def rows(processor: Any, student: Any, rank: int) -> list[dict[str, Any]]:
    """Prompts with pictures of one colour each and answers of random letters, of unequal length."""
    torch.manual_seed(10 + rank)
    found = []
    for number in range(ROWS):
        content = [{"type": "image"}, {"type": "text", "text": "Which?" + "?" * number}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        picture = Image.new("RGB", (96, 96), (60 * number + 20, 30 + 40 * rank, 60))
        encoded = processor(text=[text], images=[picture], return_tensors="pt")
        answer = torch.randint(0, 250, (3 + number,))
        ids = torch.cat([encoded["input_ids"][0], answer])
        types = torch.cat([encoded["mm_token_type_ids"][0], torch.zeros_like(answer)])[None]
        grid = encoded["image_grid_thw"]
        positions, _ = student.model.get_rope_index(
            ids[None], image_grid_thw=grid, attention_mask=torch.ones_like(ids[None]), mm_token_type_ids=types
        )
        planes = torch.cat([torch.arange(len(ids))[None], positions[:, 0]]).contiguous()
        pixels = {name: encoded[name] for name in ("pixel_values", "image_grid_thw")}
        found.append({"ids": ids, "answer": answer, "positions": planes, "pixels": pixels})
    return found


def batch(found: list[dict[str, Any]]) -> Any:
    def jagged(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

    ones = jagged([torch.ones(len(row["answer"])) for row in found])
    tensors = {
        "input_ids": jagged([row["ids"] for row in found]),
        "position_ids": jagged([row["positions"] for row in found]),
        "responses": jagged([row["answer"] for row in found]),
        "prompts": jagged([row["ids"][: -len(row["answer"])] for row in found]),
        "response_mask": ones, "loss_mask": ones, "multi_modal_inputs": [row["pixels"] for row in found],
    }  # fmt: skip
    lengths = [len(row["ids"]) for row in found]
    return tu.get_tensordict(tensors, {"temperature": 1.0, "global_token_num": lengths, "pad_token_id": 0})


def textbook(student: Any, teacher: Any, every: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The steered gradient of the rows of all processes, from full logits by autograd, row by row."""
    config = student.config
    gone = torch.tensor([config.image_token_id, config.vision_start_token_id, config.vision_end_token_id])
    parameters = dict(student.named_parameters())
    sums = [{name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2)]
    tokens = sum(len(row["answer"]) for row in every)
    for row in every:
        ids, count = row["ids"][None], len(row["answer"])
        text = ids[:, ~torch.isin(ids[0], gone)]

        def log_probs(model: Any, seen: bool, ids: Any = ids, text: Any = text, n: int = count, row: Any = row) -> Any:
            # verl patches the model's class, which then derives no positions itself.
            picture = {"position_ids": row["positions"][:, None], **row["pixels"]} if seen else {}
            return model(input_ids=ids if seen else text, **picture).logits[0, -n - 1 : -1].log_softmax(-1)

        p = log_probs(student, True)
        with torch.no_grad():
            q, r, p0 = log_probs(teacher, True), log_probs(teacher, False), log_probs(student, False)
        for part, target in enumerate((q, (p0 + q - r).log_softmax(-1))):
            loss = (p.exp() * (p - target)).sum() / tokens
            grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(parameters, grads, strict=True):
                if gradient is not None:
                    sums[part][name] += gradient
    flat = torch.stack([torch.cat([g.flatten() for g in part.values()]) for part in sums])
    weights = POLICY(flat @ flat.T)
    return {name: weights[0] * sums[0][name] + weights[1] * sums[1][name] for name in parameters}


def main() -> None:
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    made = worker()
    engine = made.engine
    assert type(engine).__name__ == "VGSEngine"
    student, teacher = (
        AutoModelForImageTextToText.from_pretrained(f"{MODELS}/qwen3_vl-{role}", dtype=torch.float32).eval()
        for role in ("student", "teacher")
    )
    processor = engine.model_config.processor
    every = [row for other in range(processes) for row in rows(processor, student, other)]
    found: dict[str, torch.Tensor] = {}
    step = engine.optimizer_step

    def optimizer_step() -> Any:
        for name, parameter in engine.module.named_parameters():
            if parameter.grad is not None:
                whole = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                found[name] = whole.clone()
        return step()

    engine.optimizer_step = optimizer_step
    output = made.train_batch(batch(every[rank * ROWS : (rank + 1) * ROWS]))
    metrics = tu.get(output, "metrics")
    assert set(metrics["vgs/skipped"]) == {0.0}, metrics  # a value a process
    expected = textbook(student, teacher, every)
    assert found.keys() <= expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found.get(name, torch.zeros_like(gradient)),
            gradient,
            atol=1e-5,
            rtol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-3, "gradients too small to compare"
    if rank == 0:
        print("EQUAL", largest, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

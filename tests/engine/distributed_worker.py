"""One process of the distributed tests: trains the same global batches in every way asked for and saves the results.

Run by `torchrun` (or alone, for the single-process reference) from `test_distributed.py`:

    python tests/engine/distributed_worker.py OUTPUT_DIR single|ddp|fsdp2
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

GLOBAL_BATCH = 8
STEPS = 5
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen3VLTextDecoderLayer,Qwen3VLVisionBlock",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


class Case(NamedTuple):
    """One training run, the same in every mode."""

    method: str
    eta: str
    checkpointing: bool
    accumulation: int
    lora: bool = False
    uneven: str = ""  # what is the matter with the rows of the second of two processes
    teacher: str = "replicate"  # teacher_sharding, where there are several processes
    tied: bool = False  # heads to embeddings
    by_name: bool = False  # models are loaded from disk

    @property
    def name(self) -> str:
        return "-".join(f"{name}={value}" for name, value in self._asdict().items() if value)


CASES = [
    Case("vgs", "measured", False, 1),
    Case("vgs", "measured", True, 2),
    Case("vgs", "amortized", False, 2),
    Case("vgs", "amortized", True, 2),
    Case("matched", "measured", False, 1),
    Case("matched", "measured", True, 2),
    Case("teacher_prior", "measured", False, 1),
    Case("teacher_prior", "measured", True, 2),
    Case("vgs", "measured", False, 2, lora=True),
    Case("vgs", "measured", True, 2, uneven="no image"),
    Case("vgs", "measured", True, 1, uneven="too long"),
    Case("matched", "measured", True, 1, uneven="no image"),
    Case("teacher_prior", "measured", False, 1, uneven="no image", teacher="shard"),
    Case("vgs", "measured", True, 2, teacher="shard"),
    Case("vgs", "amortized", False, 1, teacher="shard", tied=True, by_name=True),
    Case("vgs", "measured", True, 1, tied=True, by_name=True),
]
TOO_LONG = 20  # tokens
STUDENT_WIDTH, TEACHER_WIDTH = 32, 48


def rows_of(case: Case, world: Any) -> Any:
    """Four rows for each of two processes in turn, as they are dealt out; uneven, the second gets other ones."""
    from vgs_distill.demo.worlds import to_prompt_dataset

    rows = to_prompt_dataset(world.training_questions(48, seed=5, prior=0.5))
    if not case.uneven:
        return rows

    def change(row: dict[str, Any], index: int) -> dict[str, Any]:
        if index // (GLOBAL_BATCH // 2) % 2 == 0:
            return row
        if case.uneven == "no image":
            return {**row, "images": []}
        (turn,) = row["prompt"]
        return {**row, "prompt": [{**turn, "content": " ".join([turn["content"]] * TOO_LONG)}]}

    return rows.map(change, with_indices=True)


def _by_name(folder: Path, models: Any, processor: Any, config: Any) -> Any:
    """The student's name, and the teacher loaded from its own where the first process alone is to read weights."""
    from vgs_distill.models.sources import teacher_source

    names = [str(folder / role) for role in ("student", "teacher")]
    for model, name in zip(models, names, strict=True):
        model.save_pretrained(name)  # by the first process alone
        processor.save_pretrained(name)
    config.distributed_state.wait_for_everyone()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    teacher = teacher_source(names[1], config).load()
    del os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]  # accelerate cannot hand a student on without a GPU
    return names[0], teacher


def train(case: Case, output_dir: Path, processes: int) -> dict[str, Any]:
    import torch
    from peft import LoraConfig
    from torch.distributed.tensor import DTensor
    from transformers import TrainerCallback
    from vgs_distill import VGSConfig, VGSTrainer
    from vgs_distill.demo.models import build_processor
    from vgs_distill.demo.worlds import make_world

    from tests.small_run import build_student

    prior = case.method == "teacher_prior"
    world = make_world("shapes")
    processor = build_processor(world.words)
    models = [
        build_student(processor, seed, width, tied=case.tied)
        for seed, width in ((1, STUDENT_WIDTH), (2, TEACHER_WIDTH))
    ]
    if case.uneven:  # every second token ends an answer, so that processes sample for different numbers of steps
        models[0].generation_config.eos_token_id = list(range(0, len(processor.tokenizer), 2))
    config = VGSConfig(
        output_dir=str(output_dir / "run" / case.name),
        method=case.method,
        teacher_sharding=case.teacher if processes > 1 else "replicate",
        eta=case.eta,
        language_preservation=1.0,
        # A quantile is over the tokens of a micro-batch and depends on how rows are grouped: here all take part.
        dependency_quantile=0.0,
        # Weights are normalised over processes and micro-batches, which the unit scale would hide.
        token_steering=3.0 if prior else 0.0,
        steering_scale="preserve" if prior else "unit",
        refresh_every=3,
        max_steps=STEPS,
        per_device_train_batch_size=GLOBAL_BATCH // processes // case.accumulation,
        gradient_accumulation_steps=case.accumulation,
        gradient_checkpointing=case.checkpointing,
        max_completion_length=5,
        max_prompt_length=TOO_LONG if case.uneven == "too long" else None,
        shuffle_dataset=not case.uneven,
        ddp_timeout=60,  # seconds in which a process that waits for ever is found
        top_k=1,  # greedy, so that completions do not depend on which process samples them
        optim="sgd",  # AdamW would blow rounding of tiny gradients up to whole steps
        learning_rate=0.05,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=3,
    )
    trainer = VGSTrainer(
        *(_by_name(output_dir / case.name, models, processor, config) if case.by_name else models),
        args=config,
        train_dataset=rows_of(case, world),
        processing_class=processor,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if case.lora else None,
    )
    if case.lora:
        with torch.no_grad():  # B starts at 0, where A has no gradient
            for name, p in trainer.model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.02, generator=torch.Generator().manual_seed(7))
    gradients: dict[str, Any] = {}

    class Tap(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step == 0:
                for name, p in model.named_parameters():
                    if p.grad is not None:
                        whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                        gradients[name.removeprefix("module.")] = whole.detach().clone()

    trainer.add_callback(Tap())
    trainer.train()
    wrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    parameters = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in wrapped.named_parameters()
    }
    losses = [row["loss/standard"] for row in trainer.state.log_history if "loss/standard" in row]
    sharded = any(isinstance(p, DTensor) for p in wrapped.parameters())
    return {"parameters": parameters, "gradients": gradients, "losses": torch.tensor(losses), "sharded": sharded}


def main() -> None:
    output_dir, mode = Path(sys.argv[1]), sys.argv[2]
    if mode == "fsdp2":
        os.environ |= FSDP2
    import torch

    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    results = {case.name: train(case, output_dir, processes) for case in CASES}
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(results, output_dir / f"{mode}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

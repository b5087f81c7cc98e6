"""One optimizer step of the engine: monolithic distillation (OPD) against exact and amortized steering.

    python -m benchmarks.training_step                 the demo's model and one of about 100 M parameters
    python -m benchmarks.training_step --model demo    one of them

Every method trains the same student on the same prompts through `VGSTrainer`; methods take turns (A B C A B C), each
turn a fresh trainer, whose first step is warm-up and is not counted. A step's time is split as the engine logs it:
rollout, teacher, student (forward and backward) and steering, and the forward passes on the masked prompts, which are
part of teacher and student. The ratio of amortized steering counts one exact step in every `refresh_every`. `matched`
runs the student twice, so its steps hold more model work than OPD's by design; the masked passes therefore stand beside
the totals.

The gate compares gradients: amortized steering that measures at every step must leave the gradient of exact steering.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PrinterCallback, TrainerCallback

from benchmarks.harness.gates import Check, Gate, relative_error
from benchmarks.harness.machine import environment, source_digest
from benchmarks.harness.records import RECORDS, Record, Row, write_record
from benchmarks.harness.tables import describe_record

METHODS = ("opd", "exact", "amortized")
PARTS = ("rollout", "teacher", "student", "steering", "masked_teacher", "masked_student")


@dataclass(frozen=True)
class Scale:
    """What is trained. `demo` is the digits recipe; `100m` has Qwen3-VL's proportions at about 100 M parameters."""

    student: dict[str, int]
    teacher: dict[str, int]
    pixels: int  # side of the square image
    vocab_size: int | None  # None: the tokenizer's
    batch_size: int
    completion: int
    steps: int  # counted, per turn


SCALES = {
    "demo": Scale(
        student={"text_width": 64, "text_layers": 2, "vision_width": 64, "vision_layers": 2, "heads": 4},
        teacher={"text_width": 96, "text_layers": 2, "vision_width": 64, "vision_layers": 2, "heads": 4},
        pixels=32,
        vocab_size=None,
        batch_size=32,
        completion=26,
        steps=40,
    ),
    "100m": Scale(
        student={"text_width": 512, "text_layers": 16, "vision_width": 384, "vision_layers": 6, "heads": 8},
        teacher={"text_width": 768, "text_layers": 16, "vision_width": 384, "vision_layers": 6, "heads": 12},
        pixels=128,
        vocab_size=32768,
        batch_size=4,
        completion=24,
        steps=5,
    ),
}


class _Tap(TrainerCallback):
    """Keeps the first step's gradient and every step's log."""

    def __init__(self) -> None:
        self.gradient: torch.Tensor | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.gradient is None:
            self.gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


class Bench:
    """The models and prompts of a scale, and a way to train some steps of them."""

    def __init__(self, scale: Scale) -> None:
        from vgs_distill.demo.models import build_processor
        from vgs_distill.demo.worlds import make_world, to_prompt_dataset

        self.scale = scale
        world = make_world("digits")
        self.processor = build_processor(world.words)
        side = scale.pixels
        self.processor.image_processor.size = {"shortest_edge": side * side, "longest_edge": side * side}
        examples = world.training_questions(4 * scale.batch_size, seed=1, prior=0.5)
        self.prompts = to_prompt_dataset(examples)
        if side != examples[0].image.width:
            images = [e.image.resize((side, side), Image.Resampling.NEAREST) for e in examples]
            self.prompts = self.prompts.remove_columns("image").add_column(
                "image", [_png(image) for image in images], feature=self.prompts.features["image"]
            )

    def build(self, size: dict[str, int], seed: int) -> Any:
        from vgs_distill.demo.models import build_model
        from vgs_distill.demo.recipes import ModelSize

        torch.manual_seed(seed)
        model = build_model(ModelSize(**size), self.processor)
        if self.scale.vocab_size is not None:
            model.resize_token_embeddings(self.scale.vocab_size, mean_resizing=False)
        return model

    def train(self, method: str, steps: int, **settings: Any) -> tuple[list[dict[str, float]], torch.Tensor, int]:
        """The logs of `steps` steps, the first step's gradient, and the number of trained parameters."""
        from vgs_distill import VGSConfig, VGSTrainer

        student = self.build(self.scale.student, seed=1)
        with tempfile.TemporaryDirectory() as folder:
            trainer = VGSTrainer(
                model=student,
                teacher_model=self.build(self.scale.teacher, seed=2).eval(),
                args=VGSConfig(
                    output_dir=folder,
                    steering="none" if method == "opd" else method,
                    max_steps=steps,
                    per_device_train_batch_size=self.scale.batch_size,
                    max_completion_length=self.scale.completion,
                    # Every completion has the same length, so that every step is the same work.
                    generation_kwargs={"min_new_tokens": self.scale.completion},
                    learning_rate=1e-4,
                    use_cpu=not torch.cuda.is_available(),
                    bf16=False,
                    gradient_checkpointing=False,
                    logging_steps=1,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    seed=3,
                    **settings,
                ),
                train_dataset=self.prompts,
                processing_class=self.processor,
            )
            tap = _Tap()
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(tap)
            trainer.train()
        assert tap.gradient is not None
        logs = [row for row in trainer.state.log_history if "step_time" in row]
        return logs, tap.gradient, sum(p.numel() for p in student.parameters())


def _png(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def measure(name: str, turns: int, refresh_every: int) -> Record:
    scale = SCALES[name]
    bench = Bench(scale)
    _, exact, parameters = bench.train("exact", 1)
    _, amortized, _ = bench.train("amortized", 1, refresh_every=1)
    gate = Gate(
        (Check("amortized at a refresh leaves the gradient of exact", relative_error(amortized, exact), 0.0, 1e-6),)
    )
    logs: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for turn in range(turns):
        for method in METHODS:
            settings = {"refresh_every": refresh_every} if method == "amortized" else {}
            found, _, _ = bench.train(method, scale.steps + 1, **settings)
            # A step that measures both gradients is a step of exact steering; its share is added below.
            logs[method] += [row for row in found[1:] if "steering/refreshed" not in row]
            print(f"turn {turn + 1} of {turns}: {method} {_median(found[1:], 'step_time'):.3f} s a step", flush=True)
    rows = [Row(method, method, [row["step_time"] for row in logs[method]]) for method in METHODS]
    parts = {
        method: {part: _median(logs[method], f"time/{part}") for part in PARTS if f"time/{part}" in logs[method][0]}
        for method in METHODS
    }
    seconds = {method: _median(logs[method], "step_time") for method in METHODS}
    seconds["amortized"] += (seconds["exact"] - seconds["amortized"]) / refresh_every
    facts = {
        "parameters": parameters,
        "refresh_every": refresh_every,
        "decomposition": "matched",
        "seconds_by_part": parts,
        "over_opd": {method: seconds[method] / seconds["opd"] for method in METHODS[1:]},
    }
    case = {"model": name, "batch": scale.batch_size, "threads": torch.get_num_threads()}
    return Record("training_step", case, gate, rows, environment(), facts=facts, sources=source_digest(Path(__file__)))


def _median(rows: list[dict[str, float]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def describe_parts(record: Record) -> str:
    lines = []
    for method, parts in record.facts["seconds_by_part"].items():
        split = ", ".join(f"{part.replace('_', ' ')} {seconds:.3f}" for part, seconds in parts.items())
        lines.append(f"  {method}: {split} (seconds, medians)")
    lines += [f"  {method} / opd: {ratio:.2f}" for method, ratio in record.facts["over_opd"].items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*SCALES, "all"], default="all")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--refresh-every", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--records", type=Path, default=RECORDS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    status = 0
    for name in SCALES if args.model == "all" else [args.model]:
        record = measure(name, args.turns, args.refresh_every)
        write_record(record, args.records)
        print(describe_record(record))
        print(describe_parts(record))
        status = status or int(not record.gate.passed)
    return status


if __name__ == "__main__":
    raise SystemExit(main())

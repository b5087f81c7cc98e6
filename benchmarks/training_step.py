"""One optimizer step of the engine: the methods over on-policy distillation (OPD), in time and in memory.

    python -m benchmarks.training_step                 the demo's model and one of about 100 M parameters
    python -m benchmarks.training_step --model demo    one of them
    python -m benchmarks.training_step --model gpu     with a real vocabulary, in bf16 where the GPU computes in it

Every variant trains the same student on the same prompts through `VGSTrainer`; variants take turns (A B C A B C), each
turn a fresh trainer, whose first step is warm-up and is not counted. A step's time is split as the engine logs it:
rollout, teacher, student (forward and backward) and steering, and the forward passes on the masked prompts, which are
part of teacher and student. The time of `eta="amortized"` over OPD's counts one measured step in every `refresh_every`.

Memory is what autograd keeps for backward, at most at once, in a step of its own under `saved_tensors_hooks`: the
activations and what the fused loss holds, without parameters, gradients and optimizer. That is exact; of a resident
size the caches of torch and glibc are a part.

The gate compares gradients: amortized steering that measures at every step must leave the gradient of `eta="measured"`,
on a CPU to 1e-6, on a GPU, where backward passes of the model add in any order, to a rounding of bf16.
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PrinterCallback, TrainerCallback

from benchmarks.harness.gates import Check, Gate, relative_error
from benchmarks.harness.machine import environment, source_digest
from benchmarks.harness.memory import SavedForBackward
from benchmarks.harness.records import RECORDS, Record, Row, Target, write_record
from benchmarks.harness.tables import bytes_text, describe_record

ETA = 0.4  # about the paper's constants, 0.41 and 0.36
_VGS: dict[str, Any] = {"method": "vgs", "gamma": 2.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "opd": {"method": "opd"},
    "vgs, λ 1, amortized": {**_VGS, "language_preservation": 1.0, "eta": "amortized"},
    "vgs, λ 1, measured": {**_VGS, "language_preservation": 1.0, "eta": "measured"},
    "vgs, λ 1, constant": {**_VGS, "language_preservation": 1.0, "eta": ETA},
    "vgs, λ 0, amortized": {**_VGS, "language_preservation": 0.0, "eta": "amortized"},
    "vgs, λ 0, measured": {**_VGS, "language_preservation": 0.0, "eta": "measured"},
    "vgs, λ 0, constant": {**_VGS, "language_preservation": 0.0, "eta": ETA},
    "matched": {"method": "matched"},
}
TIME_LIMITS = {"λ 1": 1.25, "λ 0": 1.15}  # of a step over OPD's; the paper has 1.375
MEMORY_LIMIT = 1.05  # the views run one after the other: the longer one alone sets the peak
PARTS = ("rollout", "teacher", "student", "steering", "masked_teacher", "masked_student")


@dataclass(frozen=True)
class Scale:
    """What is trained. `demo` is the digits recipe; `100m` has Qwen3-VL's proportions at about 100 M parameters, `gpu`
    at about half a billion, with Qwen's vocabulary."""

    student: dict[str, int]
    teacher: dict[str, int]
    pixels: int  # side of the square image; a token is 16 x 16 of them: 4 and 256 tokens
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
        pixels=256,
        vocab_size=32768,
        batch_size=4,
        completion=24,
        steps=5,
    ),
    "gpu": Scale(
        student={"text_width": 1024, "text_layers": 16, "vision_width": 384, "vision_layers": 6, "heads": 16},
        teacher={"text_width": 1536, "text_layers": 16, "vision_width": 384, "vision_layers": 6, "heads": 24},
        pixels=256,
        vocab_size=151936,
        batch_size=8,
        completion=128,
        steps=2,
    ),
}
BY_DEFAULT = ("demo", "100m")
GATE_LIMITS = {"cpu": 1e-6, "cuda": 2.0**-8}


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
        self._built: dict[int, Any] = {}
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
        """A model of its own, of random weights; drawing them takes longer than copying."""
        if seed not in self._built:
            self._built[seed] = self._draw(size, seed)
        return copy.deepcopy(self._built[seed])

    def _draw(self, size: dict[str, int], seed: int) -> Any:
        from vgs_distill.demo.models import build_model
        from vgs_distill.demo.recipes import ModelSize

        torch.manual_seed(seed)
        model = build_model(ModelSize(**size), self.processor)
        if self.scale.vocab_size is not None:
            model.resize_token_embeddings(self.scale.vocab_size, mean_resizing=False)
        return model

    def train(self, steps: int, **settings: Any) -> tuple[list[dict[str, float]], torch.Tensor]:
        """The logs of `steps` steps, and the first step's gradient."""
        return self._train(self.student(), steps, settings)

    def saved_bytes(self, **settings: Any) -> int:
        """What autograd keeps for backward in a step that measures where `settings` do, at most at once."""
        student = self.student()
        with SavedForBackward(student.parameters()) as saved:
            self._train(student, 1, settings)
        return saved.peak

    def student(self) -> Any:
        return self.build(self.scale.student, seed=1)

    def _train(self, student: Any, steps: int, settings: dict[str, Any]) -> tuple[list[dict[str, float]], torch.Tensor]:
        from vgs_distill import VGSConfig, VGSTrainer

        with tempfile.TemporaryDirectory() as folder:
            trainer = VGSTrainer(
                model=student,
                teacher_model=self.build(self.scale.teacher, seed=2).eval(),
                args=VGSConfig(
                    output_dir=folder,
                    max_steps=steps,
                    per_device_train_batch_size=self.scale.batch_size,
                    max_completion_length=self.scale.completion,
                    # Every completion has the same length, so that every step is the same work.
                    generation_kwargs={"min_new_tokens": self.scale.completion},
                    learning_rate=1e-4,
                    use_cpu=not torch.cuda.is_available(),
                    bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
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
        del trainer
        gc.collect()  # a trainer is a cycle, and holds models and optimizer on the device
        return logs, tap.gradient


def _png(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def measure(name: str, scale: Scale, turns: int, refresh_every: int) -> Record:
    bench = Bench(scale)
    logs: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for turn in range(turns):
        for variant, settings in VARIANTS.items():
            found, _ = bench.train(scale.steps + 1, **{**settings, "refresh_every": refresh_every})
            # A refresh is a step that measures: its share is added below.
            refreshes = settings.get("eta") == "amortized"
            logs[variant] += [row for row in found[1:] if not (refreshes and "steering/refreshed" in row)]
            print(f"turn {turn + 1} of {turns}: {variant} {_median(found[1:], 'step_time'):.3f} s a step", flush=True)
    saved = {variant: bench.saved_bytes(**settings) for variant, settings in VARIANTS.items()}
    seconds = {variant: _median(rows, "step_time") for variant, rows in logs.items()}
    for variant in seconds:
        if variant.endswith("amortized"):
            measured = seconds[variant.replace("amortized", "measured")]
            seconds[variant] += (measured - seconds[variant]) / refresh_every
    facts = {
        "parameters": sum(parameter.numel() for parameter in bench.student().parameters()),
        "image_tokens": (scale.pixels // 16) ** 2,
        "refresh_every": refresh_every,
        "seconds_by_part": {
            variant: {part: _median(rows, f"time/{part}") for part in PARTS if f"time/{part}" in rows[0]}
            for variant, rows in logs.items()
        },
        "over_opd": {variant: seconds[variant] / seconds["opd"] for variant in seconds if variant != "opd"},
        "saved_for_backward": saved,
    }
    rows = [Row(v, v, [row["step_time"] for row in logs[v]], peak_bytes=saved[v]) for v in VARIANTS]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = {"model": name, "batch": scale.batch_size}
    case |= {"threads": torch.get_num_threads()} if device == "cpu" else {}
    return Record(
        "training_step", case, _gate(bench, GATE_LIMITS[device]), rows, environment(device), _targets(facts), facts,
        sources=source_digest(Path(__file__)),
    )  # fmt: skip


def _gate(bench: Bench, limit: float) -> Gate:
    """Gradients of a first step, for either λ."""
    checks = []
    for preservation in (1.0, 0.0):
        settings = {**_VGS, "language_preservation": preservation}
        _, measured = bench.train(1, **settings, eta="measured")
        _, amortized = bench.train(1, **settings, eta="amortized", refresh_every=1)
        name = f"λ {preservation:g}: amortized at a refresh leaves the gradient of measured"
        checks.append(Check(name, relative_error(amortized, measured), 0.0, limit))
    return Gate(tuple(checks))


def _targets(facts: dict[str, Any]) -> list[Target]:
    """Of the variants that train: measured steps are a refresh's, one in `refresh_every`."""
    targets = []
    for variant, ratio in facts["over_opd"].items():
        if not variant.startswith("vgs") or variant.endswith("measured"):
            continue
        limit = next(limit for words, limit in TIME_LIMITS.items() if words in variant)
        targets.append(Target(f"{variant}: time of a step over OPD's", ratio, limit, "the paper has 1.375"))
        memory = facts["saved_for_backward"][variant] / facts["saved_for_backward"]["opd"]
        targets.append(Target(f"{variant}: memory over OPD's", memory, MEMORY_LIMIT, "one view at a time"))
    return targets


def _median(rows: list[dict[str, float]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def describe_parts(record: Record) -> str:
    lines = []
    for variant, parts in record.facts["seconds_by_part"].items():
        split = ", ".join(f"{part.replace('_', ' ')} {seconds:.3f}" for part, seconds in parts.items())
        kept = bytes_text(record.facts["saved_for_backward"][variant])
        lines.append(f"  {variant}: {split} (seconds, medians); {kept} kept for backward")
    lines += [f"  {variant} / opd: {ratio:.2f}" for variant, ratio in record.facts["over_opd"].items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*SCALES, "all"], default="all")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, help="counted, per turn; default: the scale's")
    parser.add_argument("--refresh-every", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--records", type=Path, default=RECORDS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    status = 0
    for name in BY_DEFAULT if args.model == "all" else [args.model]:
        scale = SCALES[name] if args.steps is None else replace(SCALES[name], steps=args.steps)
        record = measure(name, scale, args.turns, args.refresh_every)
        write_record(record, args.records)
        print(describe_record(record))
        print(describe_parts(record))
        status = status or int(not record.gate.passed)
    return status


if __name__ == "__main__":
    raise SystemExit(main())

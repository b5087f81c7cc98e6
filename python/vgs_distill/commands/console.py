"""What `vgs train` shows: a summary at the start, a line per log with a bar below it, and at the end what comes next.

It stands in the place of transformers' bar and its dictionaries. In a pipe there is no bar, and a line says how long
the rest takes. One process of a job writes; warnings pass as they came.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from vgs_kernels import active_backends

from ..inputs.data import has_splits
from ..resilience.checkpoints import last_checkpoint
from ..resilience.run_folder import RUN_FILE
from ..steering.methods import METHODS
from .preview import preview

if TYPE_CHECKING:
    from ..trainer import VGSTrainer

# Of a log: its name there, what a line calls it, its format. What a run does not log has no place in its lines.
_COLUMNS = (
    ("loss/standard", "loss", ".4f"),
    ("loss/lang", "lang", ".4f"),
    ("loss/vis", "vis", ".4f"),
    ("gradient/cosine", "cos", ".2f"),
    ("steering/gamma", "γ", ".2f"),
    ("steering/eta", "η", ".2f"),
    ("completions/mean_length", "length", ".1f"),
    ("completions/clipped_ratio", "cut", ".0%"),
    ("learning_rate", "lr", ".1e"),
    ("step_time", "s/step", ".3g"),
)


class _LastingConsole(Console):
    """Goes silent when nobody reads it any more, as after `| head`: the run that it shows goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class RunConsole(TrainerCallback):
    """Shows one run. `live`: with a bar, which needs a terminal."""

    def __init__(self, trainer: VGSTrainer, dataset_name: str, console: Console, *, live: bool) -> None:
        self._trainer = trainer
        self._dataset_name = dataset_name
        self._console = console
        self._bar: Progress | None = None
        self._live = live
        self._began = 0.0
        self._first_step = 0
        self._losses: list[float] = []
        self._moved: list[logging.StreamHandler[Any]] = []  # handlers that write above the bar

    @classmethod
    def attach(cls, trainer: VGSTrainer, dataset_name: str) -> RunConsole:
        """The console of this run, in the place of transformers' own; mute in all processes but the first."""
        for replaced in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(replaced)
        first = trainer.is_world_process_zero()
        console = _LastingConsole(quiet=not first)
        live = first and console.is_interactive and not trainer.args.disable_tqdm
        shown = cls(trainer, dataset_name, console, live=live)
        trainer.add_callback(shown)
        return shown

    # ------------------------------------------------------------------ before and after

    def opening(self, steps: str) -> None:
        """What is about to be trained, on what."""
        for name, value in describe(self._trainer, self._dataset_name, steps).items():
            self._print(Text.assemble((f"{name:<9}", "bold"), value))

    def closing(self, commands: Sequence[Sequence[str]]) -> None:
        """What was trained, and the next commands."""
        state, output = self._trainer.state, self._trainer.args.output_dir
        steps = state.global_step - self._first_step
        if steps:
            loss = f", loss {self._losses[0]:.4f} -> {self._losses[-1]:.4f}" if self._losses else ""
            told = f"{steps} steps in {_clock(time.monotonic() - self._began)}{loss}"
        else:
            told = f"nothing was left to do: the run had ended at step {self._first_step}"
        self._print(Text.assemble(("done     ", "bold green"), f"{told}; the model is in {output}"))
        self._commands("next", commands)

    def interrupted(self) -> None:
        """Where the run goes on, after a signal ended it."""
        args, state = self._trainer.args, self._trainer.state
        folder = Path(str(args.output_dir))
        if last_checkpoint(folder) is not None:
            launcher = ["vgs"]
            if args.world_size > 1:
                launcher = ["accelerate", "launch", "...", "-m", "vgs_distill"]
            resume = [*launcher, "train", "--config", str(folder / RUN_FILE), "--resume_from_checkpoint", "true"]
            self._print(Text.assemble(("stopped  ", "bold yellow"), f"at step {state.global_step}"))
            self._commands("resume", [resume])

    def _commands(self, name: str, commands: Sequence[Sequence[str]]) -> None:
        for index, command in enumerate(commands):
            self._print(Text.assemble((f"{'' if index else name:<9}", "bold"), shlex.join(command)))

    # ------------------------------------------------------------------ while it runs

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began, self._first_step = time.monotonic(), state.global_step
        self.opening(f"{state.max_steps}{f', {state.global_step} of them done' if state.global_step else ''}")
        if self._live:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
                console=self._console,
                transient=True,
                redirect_stderr=sys.stderr.isatty(),  # what others write to the terminal stands above the bar
            )
            self._bar.add_task("training", total=state.max_steps, completed=state.global_step, left="")
            before = sys.stderr
            self._bar.start()
            self._moved = _move_handlers(before, sys.stderr)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            task = self._bar.task_ids[0]
            self._bar.update(task, description="training", completed=state.global_step, left=self._left(state))

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description="evaluating")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "train_runtime" in logs:  # the closing summary says it
            return
        evaluation = any(name.startswith("eval_") for name in logs)
        values = {name.removeprefix("eval_"): value for name, value in logs.items()}
        if not evaluation and "loss/standard" in values:
            self._losses.append(float(values["loss/standard"]))
        line = Text().append(f"{state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}", style="bold")
        if evaluation:
            line.append("  evaluation", style="cyan")
        for name, label, form in _COLUMNS:
            if name in values:
                line.append(f"  {label} ", style="dim").append(format(float(values[name]), form))
        if self._bar is None and not evaluation and (left := self._left(state)):
            line.append(f"  {left}", style="dim")
        self._print(line)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop()

    def look(self, rows: int) -> None:
        """The summary of a run that is not started, and a preview of so many rows."""
        trainer = self._trainer
        self.opening(str(trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]))
        if rows:
            preview(trainer, rows, self._console)
        self._print(Text("\nnothing was trained, nothing was written", style="dim"))

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            for handler in self._moved:
                handler.setStream(sys.stderr)

    def _left(self, state: TrainerState) -> str:
        done, to_do = state.global_step - self._first_step, state.max_steps - state.global_step
        return f"{_clock((time.monotonic() - self._began) / done * to_do)} left" if done and to_do > 0 else ""

    def _print(self, line: Text) -> None:
        # A line of a log must stay one: where there is no terminal, rich would break it at 80 columns.
        self._console.print(line, soft_wrap=True, highlight=False)


def _move_handlers(old: TextIO, new: TextIO) -> list[logging.StreamHandler[Any]]:
    """Make the handlers of all loggers that write to `old`, as transformers' does, write to `new`; return them."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {handler for logger in loggers for handler in getattr(logger, "handlers", [])}
    moved = [handler for handler in handlers if isinstance(handler, logging.StreamHandler) and handler.stream is old]
    for handler in moved:
        handler.setStream(new)
    return moved


def describe(trainer: VGSTrainer, dataset_name: str, steps: str) -> dict[str, str]:
    """The run in a few lines, by what each is about."""
    args, device = trainer.args, trainer.accelerator.device
    batch = trainer.get_total_train_batch_size(args)
    dataset: Any = trainer.train_dataset
    rows = f"{len(dataset):,} rows" if hasattr(dataset, "__len__") else "a stream"
    learning = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in trainer.model.parameters())
    teacher = sum(p.numel() for p in trainer.teacher_model.parameters())
    student = f"{_count(whole)} parameters" + ("" if learning == whole else f", of which {_count(learning)} learn")
    backends = active_backends(device)
    return {
        "student": f"{trainer.model.config.name_or_path}, {student}",
        "teacher": f"{trainer.teacher_model.config.name_or_path}, {_count(teacher)} parameters",
        "data": f"{dataset_name}, {rows}",
        "steps": f"{steps}; {batch} rows each, learning rate {args.learning_rate:g}",
        "method": _method(trainer),
        "device": _device(trainer),
        "kernels": ", ".join(f"{op} {backend}" for op, backend in backends.items()),
        "output": str(args.output_dir),
    }


def next_commands(trainer: VGSTrainer, values: Mapping[str, Any]) -> list[list[str]]:
    """What a user would want to do with a finished run. Evaluation takes rows that it was not trained on."""
    output = str(trainer.args.output_dir)
    commands = [["vgs", "report", output]]
    rows = values["eval_dataset_name"] or values["dataset_name"]
    if values["eval_dataset_name"] or has_splits(rows):
        told = {
            "model_name_or_path": output,
            "teacher_model_name_or_path": values["teacher_model_name_or_path"],
            "dataset_name": rows,
            "output_file": str(Path(output) / "eval.json"),
        }
        flags = [word for name, value in told.items() for word in (f"--{name}", str(value))]
        commands.append(["vgs", "eval", *flags, *(["--use_cpu"] if values["use_cpu"] else [])])
    if values["use_peft"]:
        commands.append(["vgs", "export", output, "--merge", "--output", f"{output}-merged"])
    return commands


def _method(trainer: VGSTrainer) -> str:
    args = trainer.args
    method = METHODS[args.method]
    if method.second is None:
        return "opd, on-policy distillation"
    settings = [f"γ {args.gamma}"]
    if method.preserved is not None:
        settings.append(f"λ {args.language_preservation}")
    settings.append(f"weights {args.eta}" if method.unit else f"η {args.eta}")
    return ", ".join([f"{args.method}, visual gradient steering", *settings, f"image_mask {args.image_mask}"])


def _device(trainer: VGSTrainer) -> str:
    args, device = trainer.args, trainer.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    processes = "" if args.world_size == 1 else f", {args.world_size} processes"
    dtype = str(next(trainer.model.parameters()).dtype).removeprefix("torch.")
    return f"{device} ({name}{processes}), {dtype}{' under bf16 autocast' if args.bf16 else ''}"


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

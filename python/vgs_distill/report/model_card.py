"""The model card: what a distilled model is, how it came about, and code that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from accelerate import Accelerator
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import PreTrainedModel, TrainerState
from trl import DistillationTrainer

from ..config import VGSConfig
from ..models.heads import is_adapted, without_adapters
from ..steering.methods import METHODS
from .page import TEMPLATES

if TYPE_CHECKING:
    from peft import PeftModel

_TASKS = {"image": "image-text-to-text", "video": "video-text-to-text", "audio": "audio-text-to-text"}
_STEERED = {  # by method, as the end of "on its own answers ..."
    "vgs": "followed both the teacher and a visual target, its own prior with the teacher's evidence",
    "vgs_unit": "the gradients of its language loss and of its visual loss were weighed at unit length",
    "matched": "the gradients of its losses without and with the evidence were weighed at unit length",
    "teacher_prior": "the divergence from the teacher was split by the teacher's prior, both gradients at unit length",
    "language": "followed both the teacher and, without the evidence, the teacher without it",
}
_PACKAGES = ("vgs-kernels", "trl", "transformers", "torch", "datasets")


class ModelCards:
    """Writes the card of a trainer's student, in place of TRL's. The trainer's own attributes say what is in it."""

    dataset_name: str | None = None  # of the training data, as a reader would ask for it; None where nobody knows
    args: VGSConfig
    state: TrainerState
    accelerator: Accelerator
    model: Any
    teacher_model: Any
    _tag_names: list[str]
    _paper = {  # noqa: RUF012 - TRL's class attribute
        "title": "Decomposed On-Policy Distillation for Vision-Language Reasoning: Steering Gradients for Visual "
        "Grounding",
        "id": "2606.00564",
    }

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | Sequence[str] | None = None
    ) -> None:
        """Write `README.md` into the output folder: base, teacher, data, method, settings and code that runs the model.

        Args:
            model_name: what the card calls the model; None for the name of its folder.
            dataset_name: of the training data, instead of the trainer's.
            tags: of the hub, besides the trainer's.
        """
        if not self.accelerator.is_main_process:
            return
        tags = [tags] if isinstance(tags, str) else tags or []
        student = self.accelerator.unwrap_model(self.model)
        tags = list(dict.fromkeys([*self._tag_names, *(getattr(student, "model_tags", None) or []), *tags]))
        card = model_card(
            self.args,
            self.state,
            student,
            self.accelerator.unwrap_model(self.teacher_model),
            name=model_name,
            dataset=dataset_name or self.dataset_name,
            tags=tags,
            paper=DistillationTrainer._paper if self.args.method == "opd" else self._paper,
        )
        card.save(Path(self.args.output_dir or ".") / "README.md")


def model_card(
    args: VGSConfig,
    state: TrainerState,
    student: PreTrainedModel | PeftModel,  # without the wrapper of a launcher
    teacher: PreTrainedModel,
    *,
    name: str | None,
    dataset: str | None,
    tags: Sequence[str],
    paper: dict[str, str],
) -> ModelCard:
    """The card of a student as it is now.

    Args:
        name: what the card calls the model; None for the name of its folder.
        dataset: name or path of the training data, as its reader would ask for it; None where nobody knows.
        tags: of the hub.
        paper: `title` and `id` (of arXiv) of the method.
    """
    adapter = is_adapted(student)
    model = without_adapters(student)
    folder = Path(args.output_dir or ".").resolve().name
    base, taught_by = model_name(model), model_name(teacher)
    class_name = type(model).__name__
    if not hasattr(transformers, class_name):  # code that came with the model
        class_name = "AutoModelForImageTextToText"
    metadata = ModelCardData(
        base_model=_on_the_hub(base),
        datasets=_on_the_hub(dataset),
        library_name="peft" if adapter else "transformers",
        pipeline_tag=_TASKS[args.modality],
        model_name=name or folder,
        tags=["generated_from_trainer", *tags],
    )
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = templates.get_template("model_card.md.jinja").render(
        metadata=metadata.to_yaml(),
        name=name or folder,
        source=args.hub_model_id or folder,
        adapter=adapter,
        class_name=class_name,
        base=_link(base),
        teacher=_link(taught_by),
        dataset=None if dataset is None else _link(dataset, "datasets/"),
        prompts=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        args=args,
        steps=state.global_step,
        steered=_STEERED.get(args.method),
        preserves=METHODS[args.method].preserved is not None,
        paper=paper,
        versions={package: version(package) for package in _PACKAGES},
    )
    return ModelCard(text)


def model_name(model: PreTrainedModel) -> str:
    """Where it was loaded from, or its class if it was built in memory."""
    return model.config.name_or_path or type(model).__name__


def _on_the_hub(name: str | None) -> str | None:
    """The name where it is one of the hub; the metadata of a card takes no other."""
    if name is None or name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(name).exists():
        return None
    return name


def _link(name: str, kind: str = "") -> str:
    """A link to the hub; of a path only its last part, since the rest is about somebody's machine."""
    return f"[{name}](https://huggingface.co/{kind}{name})" if _on_the_hub(name) else f"`{Path(name).name}`"

"""Memory of a GPU and operations of a step, from the sizes of both models and the settings of a run."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import SHARD, VGSConfig
from ..steering.methods import METHODS
from ..steering.step import AMORTIZED
from .sizes import ModelSize

_LOGITS_ON_GPU = 1024  # tokens of a chunk of the loss, where nothing else is said
_LOGITS_ON_CPU = 149 << 20  # bytes
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Rows:
    """What a row of the dataset is taken to hold: tokens of its prompt, those of images among them, and patches."""

    prompt: int
    image: int
    patches: int
    completion: int

    @property
    def seeing(self) -> int:
        return self.prompt + self.completion

    @property
    def masked(self) -> int:
        return self.prompt - self.image + self.completion


@dataclass(frozen=True)
class Launch:
    """How a run is started: how many processes there are, and whether FSDP2 shards the student over them."""

    processes: int
    sharded: bool
    on_gpu: bool = True

    @property
    def name(self) -> str:
        how = "FSDP2" if self.sharded else "DDP"
        return "1 process" if self.processes == 1 else f"{how}, {self.processes}"


def memory(config: VGSConfig, student: ModelSize, teacher: ModelSize, rows: Rows, launch: Launch) -> dict[str, float]:
    """Name -> bytes on every GPU at the fullest moment of a step; their sum is the peak.

    Of a step that measures, where the run has any. The moments: the activations of each view beside the gradients that
    are there by then, or all gradients as they are combined, or the rollout.
    """
    shards = launch.processes if launch.sharded else 1
    teacher_shards = launch.processes if config.teacher_sharding == SHARD else 1
    held = {
        "student": student.bytes / shards,
        "teacher": 0.0 if config.teacher_device is not None else teacher.bytes / teacher_shards,
        "optimizer": 2 * student.trained_bytes / shards if "adam" in str(config.optim).lower() else 0.0,
    }
    if launch.sharded and shards > 1:  # two layers at a time, and what is outside of them
        held["gathered"] = 2.0 * student.largest_layer + student.outside_layers
    if teacher_shards > 1:
        held["gathered"] = held.get("gathered", 0.0) + 2.0 * teacher.largest_layer + _head(teacher)
    gradient = student.trained_bytes / shards
    parts = _parts(config)
    moments = [
        {
            "gradients": gradient * (parts if config.gradient_accumulation_steps > 1 else there),
            "activations": _activations(config, student, *view),
            "loss": _loss(config, student, teacher, rows, launch),
        }
        for there, view in _views(config, rows)
    ]
    moments.append({"gradients": (parts + (parts > 2)) * gradient, "activations": 0.0, "loss": 0.0})
    moments.append({"gradients": 0.0, "activations": _rollout(config, student, rows), "loss": 0.0})
    return held | max(moments, key=lambda moment: sum(moment.values()))


def _parts(config: VGSConfig) -> int:
    """How many gradients a step keeps apart."""
    method = METHODS[config.method]
    if not config.measures:
        return 1
    return len(method.parts) - (method.preserved is not None and config.language_preservation == 0)


def _views(config: VGSConfig, rows: Rows) -> list[tuple[int, tuple[int, int]]]:
    """The student's views in their order: gradients that are there when its activations are, its tokens and patches."""
    method, seeing, masked = METHODS[config.method], (rows.seeing, rows.patches), (rows.masked, 0)
    preserves = method.preserved is not None and config.language_preservation != 0
    language_first = "lang" in (method.first, method.second)
    views = [(0, masked)] if language_first else []
    kinds = {method.first, method.second, method.preserved if preserves else None} - {None, "lang"}
    views.append((int(language_first) + (len(kinds) - 1 if config.measures else 0), seeing))
    if preserves and method.preserved == "lang":
        views.append((2 if config.measures else 1, masked))
    return views


def operations(
    config: VGSConfig, student: ModelSize, teacher: ModelSize, rows: Rows, processes: int
) -> dict[str, float]:
    """Name of a pass -> floating-point operations of one optimizer step, over all processes.

    Two a parameter and token forward and four back; attention and recomputation are in them.
    """
    method = METHODS[config.method]
    number = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    measured = 0.0 if not config.measures else 1.0 / config.refresh_every if config.eta == AMORTIZED else 1.0

    def forward(size: ModelSize, tokens: int, patches: int = 0) -> float:
        return number * (
            2.0 * size.decoder * tokens + 2.0 * size.tower * patches + 2.0 * size.layers * size.attention * tokens**2
        )

    seeing, masked = (forward(student, tokens) for tokens in (rows.seeing, rows.masked))
    seeing = forward(student, rows.seeing, rows.patches)
    back = 3.0 if config.gradient_checkpointing else 2.0  # the forward pass again
    passes = {
        "rollout": seeing + number * 2.0 * student.head * rows.completion,
        "teacher": forward(teacher, rows.seeing, rows.patches),
        "student": seeing,
    }
    backward = back * seeing * (1.0 + (measured if len({"standard", "vis", "prior"} & set(method.parts)) > 1 else 0.0))
    if method.masks_teacher:
        passes["teacher without the image"] = forward(teacher, rows.masked)
    if method.masks_student:
        passes["student without the image"] = masked
    if "lang" in (method.first, method.second):
        backward += back * masked
    elif method.preserved == "lang" and config.language_preservation:
        passes["student without the image"] += masked
        backward += back * masked
    passes["backward"] = backward
    streams = (1 + 2 * method.masks_teacher, 1 + ("vis" in method.parts))
    passes["heads"] = (
        number * 2.0 * rows.completion * (streams[0] * teacher.head + (streams[1] + 2 + 2 * measured) * student.head)
    )
    return passes


def _activations(config: VGSConfig, student: ModelSize, tokens_of_row: int, patches_of_row: int) -> float:
    batch = config.per_device_train_batch_size
    tokens, patches = batch * tokens_of_row, batch * patches_of_row
    dtype = 2 if config.bf16 else _FLOAT
    kept = tokens * student.kept + patches * student.kept_by_patch
    if config.gradient_checkpointing:  # inputs of the layers, and one layer at a time
        kept = tokens * (student.layers * student.width * _FLOAT + student.kept / student.layers)
    mask = batch * tokens_of_row**2
    at_work = tokens * dtype * (2 * student.inner + 2 * student.width)  # gradients in the layer that runs back
    return kept + mask + at_work


def _loss(config: VGSConfig, student: ModelSize, teacher: ModelSize, rows: Rows, launch: Launch) -> float:
    """Logits of a chunk, gradients of the head in float32, and the hidden states that are compared."""
    method = METHODS[config.method]
    tokens = config.per_device_train_batch_size * rows.completion
    streams = 2 + method.masks_teacher + ("vis" in method.parts)
    objectives = 2 if config.measures and "vis" in (method.first, method.second) and method.first == "standard" else 1
    most = config.max_chunk_bytes or (float("inf") if launch.on_gpu else _LOGITS_ON_CPU)
    chunk = min(tokens, config.chunk_tokens or (_LOGITS_ON_GPU if launch.on_gpu else tokens))
    logits = min(most, chunk * student.vocabulary * _FLOAT * (streams + objectives * launch.on_gpu))
    heads = objectives * student.head * _FLOAT if student.trained == student.parameters else 0.0
    if config.bf16:
        heads += 2.0 * student.head  # cast to the dtype that products are in
    hidden = tokens * _FLOAT * (2 * student.width + (1 + method.masks_teacher) * teacher.width)
    return logits + heads + hidden


def _rollout(config: VGSConfig, student: ModelSize, rows: Rows) -> float:
    """Keys and values of all rows of a step."""
    number = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return float(number * rows.seeing * student.cached * (2 if config.bf16 else _FLOAT))


def _head(size: ModelSize) -> float:
    return size.head * size.bytes / size.parameters

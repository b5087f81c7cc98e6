"""What small runs on the CPU have in common: their settings, and students and teachers of half a second's training.

For tests and the processes they start. Imports nothing heavy before a function is called.
"""

from __future__ import annotations

from typing import Any

ON_CPU: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def build_student(processor: Any, seed: int, width: int = 32) -> Any:
    """A Qwen3-VL with random weights that reads what `processor` writes; a wider one serves as the teacher."""
    import torch
    from vgs_distill.demo.models import build_model
    from vgs_distill.demo.recipes import ModelSize

    torch.manual_seed(seed)
    return build_model(ModelSize(text_width=width, vision_width=32), processor)

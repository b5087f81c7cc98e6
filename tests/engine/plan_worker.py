"""One small run in a process of its own: its peak of memory, beside what the plan says of it.

python tests/engine/plan_worker.py '{"method": "vgs", "size": [512, 4], ...}'
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

PROMPT_WORDS = 300


def resident(name: str = "VmRSS") -> int:
    """Bytes of this process in memory, now or at its fullest (VmHWM)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main() -> None:
    asked: dict[str, Any] = json.loads(sys.argv[1])
    width, layers = asked.pop("size")
    lora = asked.pop("lora", False)
    # Whatever a run imports is in memory before the one that counts; in a fresh installation it is compiled first.
    measure(32, 1, lora, asked)
    measured, planned, parameters = measure(width, layers, lora, asked)
    print(json.dumps({"measured": measured, "planned": sum(planned.values()), "parts": planned, "n": parameters}))


def measure(width: int, layers: int, lora: bool, asked: dict[str, Any]) -> tuple[int, dict[str, float], int]:
    """Train two steps: the peak of this process above where it started, what the plan says, and the parameters."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from PIL import Image
    from vgs_distill import VGSConfig, VGSTrainer
    from vgs_distill.demo import models
    from vgs_distill.demo.recipes import ModelSize
    from vgs_distill.inputs.modalities import IMAGE
    from vgs_distill.models.modules import linear_layers
    from vgs_distill.planning.cost import Launch, Rows, memory
    from vgs_distill.planning.sizes import model_size

    torch.set_num_threads(1)
    models._MAX_POSITIONS = 4096
    processor = models.build_processor([f"w{number}" for number in range(4000)])
    adapter = partial(lambda model: LoraConfig(r=8, target_modules=linear_layers(model)) if lora else None)
    with tempfile.TemporaryDirectory() as folder:
        config = VGSConfig(
            folder, max_steps=2, max_completion_length=64, use_cpu=True, bf16=False, report_to="none",
            save_strategy="no", disable_tqdm=True, learning_rate=1e-4, optim="adamw_torch", logging_steps=1,
            record_completions_every=0, check_dataset_rows=0, generation_kwargs={"min_new_tokens": 64}, **asked,
        )  # fmt: skip
        prompt = " ".join(f"w{number}" for number in range(PROMPT_WORDS))
        row = {"prompt": [{"role": "user", "content": prompt}], "images": [Image.new("RGB", (32, 32), "red")]}
        dataset = Dataset.from_list([row] * 16)
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        start = resident()
        torch.manual_seed(0)
        student, teacher = (
            models.build_model(ModelSize(size, text_layers=layers, vision_width=64), processor) for size in (width, 256)
        )
        trainer = VGSTrainer(
            student,
            teacher,
            config,
            dataset,
            processing_class=processor,
            peft_config=adapter(student) if lora else None,
        )
        Path("/proc/self/clear_refs").write_text("5")
        trainer.train()
        peak = resident("VmHWM") - start
        tokens = len(trainer._tokenize_prompts([trainer._messages(trainer.data_collator([row])[0])])[0][0])
    sizes = [
        model_size(model.config, torch.float32, IMAGE, adapter=adapter if model is student else lambda model: None)
        for model in (student, teacher)
    ]
    rows = Rows(tokens, models.IMAGE_TOKENS, models.IMAGE_TOKENS * models.MERGE**2, 64)
    planned = dict(memory(config, *sizes, rows, Launch(1, sharded=False, on_gpu=False)))
    return peak, planned, sizes[0].parameters


if __name__ == "__main__":
    main()

"""The shapes that the peers publish figures for, to be measured on GPUs.

Liger: benchmark/scripts/benchmark_distill_jsd_loss.py of linkedin/Liger-Kernel, bf16, 1024 to 8192 tokens, vocabulary
128256, teacher width 4096, student width half of that. TRL: the loss-head shape of huggingface/trl issue 7244, bf16,
8192 tokens, width 4096, vocabulary 151936. "longest" is ours: twice the tokens at the widths of Qwen3-VL 2B and 8B.
"""

from __future__ import annotations

from typing import NamedTuple


class Protocol(NamedTuple):
    source: str
    dtype: str
    shape: dict[str, int]  # as in a record of the benchmarks from hidden states


def _shape(tokens: int, width: int, teacher_width: int, vocab: int) -> dict[str, int]:
    return {"tokens": tokens, "width": width, "teacher_width": teacher_width, "vocab": vocab}


# In the order in which `make gpu-check` runs them.
GPU_PROTOCOLS = (
    Protocol("TRL", "bf16", _shape(8192, 4096, 4096, 151936)),
    *(Protocol("Liger", "bf16", _shape(tokens, 2048, 4096, 128256)) for tokens in (8192, 1024, 4096, 2048)),
    Protocol("longest", "bf16", _shape(16384, 2048, 4096, 151936)),
    Protocol("this project's CPU table", "bf16", _shape(512, 1024, 1024, 151936)),
    Protocol("this project's CPU table", "fp32", _shape(512, 1024, 1024, 151936)),
)

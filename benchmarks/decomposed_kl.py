"""`decomposed_kl` on logits against the machine's copy bandwidth, plain torch and torch.compile.

    python -m benchmarks.decomposed_kl            512 x 151936 logits, three streams; bf16 and fp32, 1 and 2 threads
    python -m benchmarks.decomposed_kl --quick    small shapes

The loss reads three streams, the gradient reads them again and writes one: 7 times the logits. That traffic over the
time is compared with the bandwidth of a copy of as many bytes, measured in the same turns.

A copy has its destination ready: the kernels, writing into a gradient tensor that exists, are what
is held against it. The public function returns a new tensor, and the system hands out its pages one by one; a copy into
a new tensor shows what that costs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness.cases import DTYPES, case_of, case_parser, drive
from benchmarks.harness.gates import Check, Gate, accumulation_dtype, relative_error
from benchmarks.harness.lineup import Lineup
from benchmarks.harness.machine import environment, source_digest
from benchmarks.harness.memory import MEMORY_METHOD
from benchmarks.harness.records import Record, Target
from vgs_kernels import backend
from vgs_kernels import old_decomposed_kl as decomposed_kl
from vgs_kernels.decomposed_kl.old_types import LogitTransform

NAME = "decomposed_kl"
TARGET_SHAPE = {"tokens": 512, "vocab": 151936}
GATE_TOKENS = 16
READS_AND_WRITES = 7
STEERING_WEIGHTS = (0.3, 1.7)
COMPILE_LIMIT_S = 150.0


def logits(tokens: int, vocab: int, dtype: torch.dtype, device: str, spread: float = 2.0) -> list[Tensor]:
    """Student, teacher and masked teacher logits of that standard deviation."""
    generator = torch.Generator(device).manual_seed(1)
    return [
        torch.empty(tokens, vocab, dtype=dtype, device=device).normal_(0, spread, generator=generator) for _ in range(3)
    ]


Parts = Callable[..., tuple[Tensor, Tensor]]


def our_parts(student: Tensor, teacher: Tensor, masked_teacher: Tensor) -> tuple[Tensor, Tensor]:
    parts = decomposed_kl(student, teacher, masked_teacher, decomposition="teacher_prior")
    return parts.lang, parts.vis


def plain_parts(student: Tensor, teacher: Tensor, masked_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Plain torch, softmax in fp32 for 16-bit logits."""
    dtype = accumulation_dtype(student.dtype)
    return peers.plain_parts("teacher_prior", student.to(dtype), teacher.to(dtype), masked_teacher.to(dtype))


def loss_and_gradient(parts: Parts, streams: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token lang and vis, and the gradient of their steered sum with respect to the student's logits."""
    student = streams[0].detach().requires_grad_()
    lang, vis = parts(student, *streams[1:])
    objective = STEERING_WEIGHTS[0] * lang.sum() + STEERING_WEIGHTS[1] * vis.sum()
    return lang.detach(), vis.detach(), torch.autograd.grad(objective, student)[0]


def run_gate(vocab: int, dtype: str, device: str, parts: Parts = our_parts) -> Gate:
    """Values and gradients on spread-out and on peaked logits against fp64. `parts`: tests plant errors there."""
    checks = []
    torch_dtype = DTYPES[dtype]
    for kind, spread in (("random", 2.0), ("peaked", 30.0)):
        streams = logits(GATE_TOKENS, vocab, torch_dtype, device, spread)
        exact = loss_and_gradient(plain_parts, [stream.double() for stream in streams])
        results, plains = loss_and_gradient(parts, streams), loss_and_gradient(plain_parts, streams)
        largest = max(stream.abs().max().item() for stream in streams)
        floor = 4 * torch.finfo(accumulation_dtype(torch_dtype)).eps * largest  # see linear_decomposed_kl
        for name, result, plain, truth in zip(("lang", "vis", "gradient"), results, plains, exact, strict=True):
            errors = relative_error(result, truth), relative_error(plain, truth)
            own = torch.finfo(result.dtype).eps / 8
            checks.append(Check(f"{kind} {name}", *errors, floor + own))
    return Gate(tuple(checks))


def kernel_calls(streams: Sequence[Tensor], gradient: Tensor, device: str) -> dict[str, Callable[[], Any]]:
    """The two kernels of the backend, the gradient into a tensor that exists."""
    kernels = backend.load(NAME, backend.resolve(NAME, torch.device(device)))
    tokens, vocab = streams[0].shape
    transform = LogitTransform("teacher_prior", vocab, 1.0, 1.0, 1.0, 0.0, 0.0)
    dtype = accumulation_dtype(streams[0].dtype)
    # entropy, full, prior, shift, masked: vis = full - prior, lang = prior
    row = [0.0, STEERING_WEIGHTS[1], STEERING_WEIGHTS[0] - STEERING_WEIGHTS[1], 0.0, 0.0]
    coefficients = torch.tensor(row, dtype=dtype, device=device).repeat(tokens, 1)
    values, statistics = kernels.divergences(*streams, None, transform)

    def loss() -> None:
        kernels.divergences(*streams, None, transform)

    def slope() -> None:
        kernels.logit_gradients(*streams, None, values, statistics, coefficients, transform, out_student=gradient)

    def both() -> None:
        loss()
        slope()

    return {"kernel_loss": loss, "kernel_gradient": slope, "kernel_both": both}


def line_up(streams: Sequence[Tensor], gradient: Tensor, device: str) -> Lineup:
    lineup = Lineup(device)
    size = gradient.numel() * gradient.element_size()
    whole = READS_AND_WRITES * size
    kernels = kernel_calls(streams, gradient, device)
    lineup.add("copy", "a copy of one stream", lambda: gradient.copy_(streams[1]), bytes_moved=2 * size)
    lineup.add("clone", "a copy of one stream into a new tensor", lambda: streams[1].clone(), bytes_moved=2 * size)
    lineup.add("kernel_loss", "kernel, loss", kernels["kernel_loss"], bytes_moved=3 * size)
    lineup.add(
        "kernel_gradient", "kernel, gradient into an existing tensor", kernels["kernel_gradient"], bytes_moved=4 * size
    )
    lineup.add("kernel_both", "kernels, loss and gradient", kernels["kernel_both"], bytes_moved=whole)
    lineup.add(
        "ours", "decomposed_kl, forward and backward, new tensor",
        lambda: loss_and_gradient(our_parts, streams), bytes_moved=whole,
    )  # fmt: skip
    lineup.add(
        "naive", "plain torch, forward and backward", lambda: loss_and_gradient(plain_parts, streams), ours="ours"
    )
    return lineup


def measure(shape: dict[str, int], dtype: str, threads: int, args: argparse.Namespace) -> Record:
    """Gate, then turns, then the record of one case. A red gate ends it before any timing."""
    start = time.perf_counter()
    device = args.device
    gate = run_gate(shape["vocab"], dtype, device)
    print(gate.describe(), flush=True)
    facts: dict[str, Any] = {
        "backend": backend.resolve(NAME, torch.device(device)),
        "memory": MEMORY_METHOD[device],
        "bytes": "3 reads for the loss, 3 reads and 1 write for the gradient; a copy counts 1 read and 1 write",
    }
    record = Record(
        NAME, case_of(shape, dtype, threads), gate, [], environment(device), facts=facts,
        sources=digest(),
    )  # fmt: skip
    if not gate.passed:
        return record
    streams = logits(shape["tokens"], shape["vocab"], DTYPES[dtype], device)
    gradient = torch.zeros_like(streams[0])
    size = streams[0].numel() * streams[0].element_size()
    lineup = line_up(streams, gradient, device)
    if not args.no_compile:
        compiled = torch.compile(plain_parts, dynamic=False)
        lineup.add(
            "compiled", "plain torch under torch.compile", lambda: loss_and_gradient(compiled, streams), ours="ours"
        )
        facts["compiled_first_call_seconds"] = lineup.call_first("compiled", COMPILE_LIMIT_S)
    lineup.take_turns(
        args.rounds, 5 * args.rounds, args.budget,
        warm_up=[name for name in lineup.calls if device == "cuda" or name not in ("naive", "compiled")],
    )  # fmt: skip
    rows = lineup.rows
    record.rows = list(rows.values())
    copied = rows["copy"].median
    assert copied is not None
    bandwidth = 2 * size / copied
    facts["copy_bandwidth"] = bandwidth
    facts["share_of_copy_bandwidth"] = {
        row.name: row.bytes_moved / row.median / bandwidth for row in record.rows if row.bytes_moved and row.median
    }
    if shape == TARGET_SHAPE and dtype == "fp32" and device == "cpu":
        share = facts["share_of_copy_bandwidth"].get("kernel_both")
        text = "kernels, loss and gradients of three fp32 streams: share of the copy bandwidth"
        record.targets = [Target(text, share, 0.6, "nothing moves bytes faster than a copy", at_least=True)]
    facts["case_seconds"] = time.perf_counter() - start
    return record


def digest() -> str:
    return source_digest(Path(__file__), Path(peers.__file__))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = case_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151936)
    args = parser.parse_args(arguments)
    if args.quick:
        args.tokens, args.vocab, args.no_compile, args.budget = 64, 8192, True, 0.2
    shape = {"tokens": args.tokens, "vocab": args.vocab}
    size = args.tokens * args.vocab / (512 * 151936)
    return drive(
        "benchmarks.decomposed_kl",
        args,
        shape,
        digest(),
        lambda dtype, threads: measure(shape, dtype, threads, args),
        lambda _dtype, _threads: 20 + 70 * size,
    )


if __name__ == "__main__":
    sys.exit(main())

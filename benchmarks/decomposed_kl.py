"""`reverse_kl` and `decomposed_kl` on logits against the machine's copy bandwidth, plain torch and torch.compile.

    python -m benchmarks.decomposed_kl            512 x 151936 logits; bf16 and fp32, 1 and 2 threads
    python -m benchmarks.decomposed_kl --quick    small shapes

The loss reads two, three or four streams, the gradient reads them again and writes one. That traffic over the time is
compared with the bandwidth of a copy, measured in the same turns. A copy has its destination ready: the kernels,
writing into a gradient tensor that exists, are what is held against it. The public functions return a new tensor, and
the system hands out its pages one by one; a copy into a new tensor shows what that costs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import methods, truth
from benchmarks.harness.cases import DTYPES, case_of, case_parser, drive
from benchmarks.harness.gates import Check, Gate, accumulation_dtype, relative_error
from benchmarks.harness.lineup import Lineup
from benchmarks.harness.machine import environment, source_digest
from benchmarks.harness.memory import MEMORY_METHOD
from benchmarks.harness.records import Record, Target
from benchmarks.methods import GAMMA, OBJECTIVES, PRIOR_WEIGHTS
from vgs_kernels import backend, decomposed_kl, reverse_kl
from vgs_kernels.stream_kl.reference import Streams
from vgs_kernels.stream_kl.transform import LogitTransform

NAME = "decomposed_kl"
TARGET_SHAPE = {"tokens": 512, "vocab": 151936}
GATE_TOKENS = 16
COMPILE_LIMIT_S = 150.0
STREAMS = ("student", "teacher", "masked_teacher", "masked_student")
Losses = Callable[..., Tensor]  # logits of some of `STREAMS`, in this order -> (tokens,)


class Kind(NamedTuple):
    """What is measured: a loss of the first streams."""

    label: str
    streams: int
    objective: str  # of `OBJECTIVES`
    coefficients: tuple[float, float, float]  # of entropy, standard and the third number
    ours: Losses

    @property
    def traffic(self) -> int:
        """Reads and writes of whole streams, of loss and gradient."""
        return 2 * self.streams + 1

    def plain(self, *streams: Tensor) -> Tensor:
        """Plain torch, softmax in fp32 for 16-bit logits."""
        wide = [stream.to(accumulation_dtype(stream.dtype)) for stream in streams]
        return OBJECTIVES[self.objective].losses(**dict(zip(STREAMS, wide, strict=False)))


def _our_vgs(*streams: Tensor) -> Tensor:
    parts = decomposed_kl(*streams, decomposition="vgs")
    return parts.standard + GAMMA * parts.vis


def _our_prior(*streams: Tensor) -> Tensor:
    parts = decomposed_kl(*streams, decomposition="teacher_prior")
    return PRIOR_WEIGHTS[0] * parts.lang + PRIOR_WEIGHTS[1] * parts.vis


KINDS = {
    "reverse_kl": Kind("reverse KL", 2, "standard", (0.0, 1.0, 0.0), lambda *streams: reverse_kl(*streams).kl),
    "prior": Kind(
        "teacher_prior", 3, "prior", (0.0, PRIOR_WEIGHTS[1], PRIOR_WEIGHTS[0] - PRIOR_WEIGHTS[1]), _our_prior
    ),
    "vgs": Kind("VGS", 4, "vgs", (0.0, 1.0, GAMMA), _our_vgs),
}


def logits(tokens: int, vocab: int, dtype: torch.dtype, device: str, spread: float = 2.0) -> list[Tensor]:
    """The four streams, of that standard deviation."""
    generator = torch.Generator(device).manual_seed(1)
    return [
        torch.empty(tokens, vocab, dtype=dtype, device=device).normal_(0, spread, generator=generator) for _ in STREAMS
    ]


def loss_and_gradient(losses: Losses, streams: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Per-token losses, and the gradient of their sum with respect to the student's logits."""
    student = streams[0].detach().requires_grad_()
    found = losses(student, *streams[1:])
    return found.detach(), torch.autograd.grad(found.sum(), student)[0]


def run_gate(vocab: int, dtype: str, device: str, ours: Mapping[str, Losses] | None = None) -> Gate:
    """Losses and gradients on spread-out and on peaked logits against fp64. `ours`: tests plant errors there."""
    checks = []
    for spread in (2.0, 30.0):
        everything = logits(GATE_TOKENS, vocab, DTYPES[dtype], device, spread)
        largest = max(stream.abs().max().item() for stream in everything)
        floor = 4 * torch.finfo(accumulation_dtype(DTYPES[dtype])).eps * largest  # see linear_gate
        for name, kind in KINDS.items():
            streams = everything[: kind.streams]
            exact = loss_and_gradient(kind.plain, [stream.double() for stream in streams])
            plain = loss_and_gradient(kind.plain, streams)
            results = loss_and_gradient((ours or {}).get(name, kind.ours), streams)
            for what, result, other, truth_ in zip(("losses", "gradient"), results, plain, exact, strict=True):
                errors = relative_error(result, truth_), relative_error(other, truth_)
                own = torch.finfo(result.dtype).eps / 8
                checks.append(Check(f"logits ± {spread:g}, {name} {what}", *errors, floor + own))
    return Gate(tuple(checks))


def kernel_calls(kind: Kind, everything: Sequence[Tensor], gradient: Tensor) -> dict[str, Callable[[], Any]]:
    """The two kernels of the backend, the gradient into a tensor that exists."""
    kernels = backend.load("stream_kl", backend.resolve("stream_kl", gradient.device))
    streams = Streams(*everything[: kind.streams], *[None] * (4 - kind.streams))
    transform = LogitTransform(gradient.shape[1])
    row = torch.tensor(kind.coefficients, dtype=accumulation_dtype(gradient.dtype), device=gradient.device)
    coefficients = row.repeat(gradient.shape[0], 1)
    values, statistics = kernels.divergences(streams, transform)

    def loss() -> None:
        kernels.divergences(streams, transform)

    def slope() -> None:
        kernels.logit_gradients(streams, values, statistics, coefficients, transform, out=gradient)

    def both() -> None:
        loss()
        slope()

    return {"loss": loss, "gradient": slope, "both": both}


def line_up(everything: Sequence[Tensor], gradient: Tensor, device: str, compile_peers: bool) -> Lineup:
    lineup = Lineup(device)
    size = gradient.numel() * gradient.element_size()
    lineup.add("copy", "a copy of one stream", lambda: gradient.copy_(everything[1]), bytes_moved=2 * size)
    lineup.add("clone", "a copy of one stream into a new tensor", lambda: everything[1].clone(), bytes_moved=2 * size)
    for name, kind in KINDS.items():
        streams, whole = everything[: kind.streams], kind.traffic * size
        kernels = kernel_calls(kind, everything, gradient)
        moved = {"loss": kind.streams * size, "gradient": (kind.streams + 1) * size, "both": whole}
        labels = {"loss": "loss", "gradient": "gradient into an existing tensor", "both": "loss and gradient"}
        for part, call in kernels.items():
            lineup.add(f"{name}_{part}", f"{kind.label}: kernels, {labels[part]}", call, bytes_moved=moved[part])
        lineup.add(
            name, f"{kind.label}: public function, forward and backward, new tensor",
            lambda k=kind, s=streams: loss_and_gradient(k.ours, s), bytes_moved=whole,
        )  # fmt: skip
        lineup.add(
            f"{name}_plain", f"{kind.label}: plain torch", lambda k=kind, s=streams: loss_and_gradient(k.plain, s),
            ours=name,
        )  # fmt: skip
        if compile_peers:
            compiled = torch.compile(kind.plain, dynamic=False)
            lineup.add(
                f"{name}_compiled", f"{kind.label}: plain torch under torch.compile",
                lambda c=compiled, s=streams: loss_and_gradient(c, s), ours=name,
            )  # fmt: skip
    return lineup


def measure(shape: dict[str, int], dtype: str, threads: int, args: argparse.Namespace) -> Record:
    """Gate, then turns, then the record of one case. A red gate ends it before any timing."""
    start = time.perf_counter()
    device = args.device
    gate = run_gate(shape["vocab"], dtype, device)
    print(gate.describe(), flush=True)
    facts: dict[str, Any] = {
        "backend": backend.resolve("stream_kl", torch.device(device)),
        "memory": MEMORY_METHOD[device],
        "bytes": "a read a stream for the loss, the same and a write for the gradient; a copy is 1 read and 1 write",
    }
    record = Record(
        NAME, case_of(shape, dtype, threads), gate, [], environment(device), facts=facts,
        sources=digest(),
    )  # fmt: skip
    if not gate.passed:
        return record
    streams = logits(shape["tokens"], shape["vocab"], DTYPES[dtype], device)
    gradient = torch.zeros_like(streams[0])
    lineup = line_up(streams, gradient, device, compile_peers=not args.no_compile)
    peers = [name for name in lineup.calls if name.endswith(("_plain", "_compiled"))]
    for name in (name for name in peers if name.endswith("_compiled")):
        facts[f"{name}_first_call_seconds"] = lineup.call_first(name, COMPILE_LIMIT_S)
    lineup.take_turns(
        args.rounds, 5 * args.rounds, args.budget,
        warm_up=[name for name in lineup.calls if device == "cuda" or name not in peers],
    )  # fmt: skip
    record.rows = list(lineup.rows.values())
    copied = lineup.rows["copy"]
    assert copied.median is not None
    assert copied.bytes_moved is not None
    facts["copy_bandwidth"] = bandwidth = copied.bytes_moved / copied.median
    facts["share_of_copy_bandwidth"] = shares = {
        row.name: row.bytes_moved / row.median / bandwidth for row in record.rows if row.bytes_moved and row.median
    }
    if shape == TARGET_SHAPE and dtype == "fp32" and device == "cpu":
        record.targets = [
            Target(f"{kind.label}, loss and gradient of {kind.streams} fp32 streams: share of the copy bandwidth",
                   shares.get(f"{name}_both"), 0.6, "nothing moves bytes faster than a copy", at_least=True)
            for name, kind in KINDS.items()
        ]  # fmt: skip
    facts["case_seconds"] = time.perf_counter() - start
    return record


def digest() -> str:
    return source_digest(Path(__file__), *(Path(str(used.__file__)) for used in (methods, truth)))


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
        lambda _dtype, _threads: 20 + 200 * size,
    )


if __name__ == "__main__":
    sys.exit(main())

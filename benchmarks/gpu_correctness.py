"""What only a GPU can get wrong, at sizes that matter: one gate and no times.

    python -m benchmarks.gpu_correctness              bf16, fp16 and fp32, heads of real size, runs of 256 tokens
    python -m benchmarks.gpu_correctness --quick      small sizes, on a CPU too

* every method from hidden states in at least three runs of unequal length, against fp64;
* the same call twice: the same bits;
* steering by every backend of the device, into new tensors and in place, with mixed dtypes, unaligned tensors, `None`
  and some thousand tensors, against fp64, and the backends against each other;
* more than 2^31 elements, in logits and in one gradient: what lies behind must come out as if it stood alone;
* two streams at once, and every other device, against what one stream of the first device gives.

What this machine cannot show is a line that says so, in the record's facts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import decomposed_kl, linear_gate
from benchmarks.harness.cases import DTYPES
from benchmarks.harness.gates import Check, Gate, relative_error
from benchmarks.harness.machine import environment, source_digest
from benchmarks.harness.records import RECORDS, Record, write_record
from benchmarks.harness.tables import describe_record
from benchmarks.inputs import random_heads, random_streams
from benchmarks.methods import METHODS
from benchmarks.truth import Result
from vgs_kernels import backend, combine_gradients, gradient_gramian, reverse_kl

NAME = "gpu_correctness"


class Sizes(NamedTuple):
    tokens: int  # of the linear calls
    rows: tuple[int, ...]  # whose logits they may hold: the first that gives several runs
    width: int
    vocabs: dict[str, int]  # by dtype; some are odd, so that rows begin anywhere
    many: int  # elements that no 32-bit index reaches
    tensors: int  # of a steered list


FULL = Sizes(643, (352, 288, 192, 128), 1024, {"bf16": 151936, "fp16": 50257, "fp32": 32003}, 2**31, 5000)
SMALL = FULL._replace(vocabs={"bf16": 32768, "fp16": 32003, "fp32": 8191})  # below 40 GiB of memory
QUICK = Sizes(11, linear_gate.ROWS, 64, {"bf16": 640, "fp16": 517, "fp32": 301}, 2**12, 200)
WEIGHTS = (0.3, -0.7)

Gradients = list[Tensor | None]


def linear_checks(sizes: Sizes, device: str) -> Iterator[Check]:
    for dtype, vocab in sizes.vocabs.items():
        heads = random_heads(sizes.width, sizes.width, vocab, DTYPES[dtype], device)
        gate, _ = linear_gate.run_gate(heads, list(METHODS), {}, sizes.tokens, rows=sizes.rows)
        yield from (_named(check, dtype) for check in gate.checks)
        streams = random_streams(sizes.tokens, heads)
        for name in METHODS:
            first, second = (linear_gate.in_runs(name, streams, sizes.rows)[0] for _ in range(2))
            pairs = [pair for a, b in zip(first, second, strict=True) for pair in _pairs(a, b)]
            yield _same(f"{dtype} {name} twice", pairs)


def logit_checks(sizes: Sizes, device: str) -> Iterator[Check]:
    for dtype, vocab in sizes.vocabs.items():
        yield from (
            _named(check, f"{dtype}, from logits,") for check in decomposed_kl.run_gate(vocab, dtype, device).checks
        )


def gradient_lists(
    sizes: Sizes, dtypes: Sequence[torch.dtype], device: str
) -> tuple[Gradients, Gradients, list[Tensor]]:
    """Two lists and a target of these dtypes: one large pair, odd sizes, rows that begin anywhere, None, empty ones."""
    generator = torch.Generator(device).manual_seed(4)

    def draw(count: int, dtype: torch.dtype, offset: int) -> Tensor:
        return torch.randn(count + offset, generator=generator, device=device).to(dtype)[offset:]

    counts = [65536 * 17 + 3, 4096, 0, 1, *(1 + 7 * (index % 61) for index in range(sizes.tensors))]
    first, second, out = (
        [draw(count, dtype, (index + place) % 4) for index, count in enumerate(counts)]
        for place, dtype in enumerate(dtypes)
    )
    lists: tuple[Gradients, Gradients] = (list(first), list(second))
    lists[0][5] = lists[1][6] = lists[0][7] = lists[1][7] = None
    return *lists, out


def steering_checks(sizes: Sizes, device: str) -> Iterator[Check]:
    """Every backend but the reference, which the others are held to."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    mixtures = {"bf16": (bf16,) * 3, "fp16": (fp16,) * 3, "fp32": (fp32,) * 3, "mixed": (bf16, fp32, fp16)}
    for label, dtypes in mixtures.items():
        plain = _steering_errors("reference", sizes, dtypes, device)
        roundings = {"Gramian": 1e-5, "apart": torch.finfo(dtypes[2]).eps, "in place": torch.finfo(dtypes[0]).eps}
        for name in backend.available("combine_gradients", device):
            if name != "reference":
                for what, error in _steering_errors(name, sizes, dtypes, device).items():
                    yield Check(f"{label} {what} by {name}", error, plain[what], roundings[what])


def _steering_errors(name: str, sizes: Sizes, dtypes: Sequence[torch.dtype], device: str) -> dict[str, float]:
    """Of a Gramian, of a combination in new tensors, and of a clipped one in those of the first list."""
    weights = torch.tensor(WEIGHTS, device=device)
    first, second, out = gradient_lists(sizes, dtypes, device)
    a, b = _flat(first, out), _flat(second, out)
    both, exact = torch.stack([a, b]), WEIGHTS[0] * a + WEIGHTS[1] * b
    gramian = gradient_gramian(first, second, backend=name)
    combine_gradients(first, second, weights, out=out, gramian=gramian, backend=name)
    errors = {"Gramian": relative_error(gramian, both @ both.T), "apart": relative_error(_flat(out, out), exact)}
    own = [torch.zeros_like(o, dtype=dtypes[0]) if a is None else a for a, o in zip(first, out, strict=True)]
    combine_gradients(own, second, weights, out=own, gramian=gramian, max_norm=1.0, backend=name)
    return errors | {"in place": relative_error(_flat(own, own), exact / exact.norm())}


def far_checks(sizes: Sizes, device: str, notes: dict[str, str]) -> Iterator[Check]:
    """Behind 2^31 elements."""
    needed = 5 * 2 * sizes.many  # bytes: two bf16 tensors, a gradient or result, and room for what a call holds
    if device == "cuda" and torch.cuda.mem_get_info()[0] < needed:
        notes["more than 2^31 elements"] = f"not run: needs {needed / 2**30:.0f} GiB of free memory"
        return
    yield _far_logits(sizes, device)
    if device == "cuda":
        torch.cuda.empty_cache()
    yield from _far_gradients(sizes, device)


def _far_logits(sizes: Sizes, device: str) -> Check:
    vocab = sizes.vocabs["bf16"]
    tokens, tail = sizes.many // vocab + 5, 4
    student, teacher = (torch.empty(tokens, vocab, dtype=torch.bfloat16, device=device).normal_(0, 2) for _ in range(2))

    def ends(student: Tensor, teacher: Tensor) -> list[Tensor]:
        student = student.requires_grad_()
        kl = reverse_kl(student, teacher).kl
        (gradient,) = torch.autograd.grad(kl.sum(), student)
        return [kl[-tail:].detach().clone(), gradient[-tail:].clone()]

    near = ends(student[-tail:].detach().clone(), teacher[-tail:].clone())
    # Few rows are split over programs and many are not: sums differ by float32 roundings, gradients by one of bf16.
    return _same(f"logits of {tokens} x {vocab}", list(zip(ends(student, teacher), near, strict=True)), 2.0**-8)


def _far_gradients(sizes: Sizes, device: str) -> Iterator[Check]:
    count, tail = sizes.many + 7, 64
    for name in backend.available("combine_gradients", device):
        if name == "reference":  # a float32 copy of everything
            continue
        first, second = (torch.full((count,), value, dtype=torch.bfloat16, device=device) for value in (0.5, 0.25))
        first[-tail:] = 3.0
        gramian = gradient_gramian([first], [second], backend=name)
        body = count - tail
        exact = torch.tensor(
            [[body / 4 + 9 * tail, body / 8 + 0.75 * tail], [body / 8 + 0.75 * tail, body / 16 + tail / 16]],
            dtype=torch.float64, device=device,
        )  # fmt: skip
        yield Check(f"Gramian of {count} elements by {name}", relative_error(gramian, exact), 0.0, 1e-4)
        weights = torch.tensor([1.0, 2.0], device=device)
        combine_gradients([first], [second], weights, out=[first], gramian=gramian, backend=name)
        ends = torch.cat([first[:tail], first[-tail:]])
        expected = torch.tensor([1.0, 3.5], device=device).repeat_interleave(tail)
        yield _same(f"combination of {count} elements by {name}", [(ends, expected)], 1e-6)


def stream_checks(sizes: Sizes, device: str, notes: dict[str, str]) -> Iterator[Check]:
    """Two calls at a time that share nothing but the device."""
    if device != "cuda":
        notes["two streams"] = "one after the other: a CPU has no streams"
    calls = _calls(sizes, device)
    alone = [call() for call in calls]
    streams = [torch.cuda.Stream() for _ in calls] if device == "cuda" else [None] * len(calls)
    for turn in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        together = []
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                together.append(call())
        if device == "cuda":
            torch.cuda.synchronize()
        pairs = [pair for a, b in zip(alone, together, strict=True) for pair in zip(a, b, strict=True)]
        # A race leaves more than the rounding by which a product may differ that was cut up in another way.
        yield _same(f"two streams, turn {turn + 1}", pairs, 2.0**-8)


def device_checks(sizes: Sizes, device: str, notes: dict[str, str]) -> Iterator[Check]:
    count = torch.cuda.device_count() if device == "cuda" else 1
    if count < 2:
        notes["several devices"] = "not run: there is one"
        return
    expected = [[tensor.cpu() for tensor in call()] for call in _calls(sizes, "cuda:0")]
    for index in range(1, count):
        # The current device stays the first: a kernel must follow its tensors.
        found = [[tensor.cpu() for tensor in call()] for call in _calls(sizes, f"cuda:{index}")]
        pairs = [pair for a, b in zip(found, expected, strict=True) for pair in zip(a, b, strict=True)]
        yield _same(f"device {index}", pairs, 1e-2)  # another kind of device adds in another order; gradients are bf16


def _calls(sizes: Sizes, device: str) -> list[Callable[[], list[Tensor]]]:
    """The loss of two students, and steering, each on inputs of its own, drawn on the CPU."""
    calls: list[Callable[[], list[Tensor]]] = []
    for seed in (1, 2):
        heads = random_heads(sizes.width, sizes.width, min(sizes.vocabs.values()), torch.bfloat16, "cpu", seed)
        drawn = random_streams(sizes.tokens, heads, seed)
        moved = type(drawn)(*(t.detach().to(device).requires_grad_(t.requires_grad) for t in vars(drawn).values()))
        calls.append(lambda s=moved: _tensors(METHODS["vgs"].ours(s)[0]))  # type: ignore[misc]
    generator = torch.Generator().manual_seed(3)
    lists = [[torch.randn(n, generator=generator).to(device) for n in (65537, 33, 4096)] for _ in range(2)]

    def steer() -> list[Tensor]:
        out = [torch.empty_like(tensor) for tensor in lists[0]]
        gramian = gradient_gramian(*lists)
        combine_gradients(*lists, torch.tensor(WEIGHTS).to(device), out=out, gramian=gramian)
        return [gramian, *out]

    return [*calls, steer]


def _tensors(result: Result) -> list[Tensor]:
    return [result.loss, *result.hidden, result.head]


def _pairs(first: Result, second: Result) -> list[tuple[Tensor, Tensor]]:
    return list(zip(_tensors(first), _tensors(second), strict=True))


def _named(check: Check, prefix: str) -> Check:
    return Check(f"{prefix} {check.name}", check.error, check.peer_error, check.floor)


def _same(name: str, pairs: Sequence[tuple[Tensor, Tensor]], allowed: float = 0.0) -> Check:
    """The worst relative difference; without an allowance every bit must be the same."""
    errors = [relative_error(found.reshape(-1), expected.reshape(-1)) for found, expected in pairs]
    return Check(name, torch.tensor(errors).max().item(), 0.0, allowed)  # `max` of Python would lose a NaN


def _flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """In fp64, one after the other; None counts as zeros."""
    pairs = zip(tensors, like, strict=True)
    return torch.cat([(torch.zeros_like(o) if t is None else t).reshape(-1).double() for t, o in pairs])


def measure(sizes: Sizes, device: str) -> Record:
    notes: dict[str, str] = {}
    checks: list[Check] = []
    parts: dict[str, Callable[[], Iterator[Check]]] = {
        "from logits": lambda: logit_checks(sizes, device),
        "from hidden states": lambda: linear_checks(sizes, device),
        "steering": lambda: steering_checks(sizes, device),
        "far": lambda: far_checks(sizes, device, notes),
        "streams": lambda: stream_checks(sizes, device, notes),
        "devices": lambda: device_checks(sizes, device, notes),
    }
    for name, part in parts.items():
        found = list(part())
        failed = [check.name for check in found if not check.passed]
        print(f"{name}: {len(found)} checks, {len(failed)} failed {failed[:5] or ''}", flush=True)
        checks += found
        if device == "cuda":
            torch.cuda.empty_cache()
    facts: dict[str, Any] = {
        "not shown": notes,
        "backends": {op: backend.available(op, device) for op in backend.OPS},
    }
    case = {"tokens": sizes.tokens, "width": sizes.width, "elements": sizes.many}
    return Record(NAME, case, Gate(tuple(checks), "fp64"), [], environment(device), facts=facts,
                  sources=source_digest(Path(__file__), *linear_gate.SOURCES))  # fmt: skip


def sizes_of(device: str, quick: bool) -> Sizes:
    if quick or device == "cpu":
        return QUICK
    return FULL if torch.cuda.get_device_properties(0).total_memory >= 40 * 2**30 else SMALL


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--records", type=Path, default=RECORDS)
    args = parser.parse_args(arguments)
    record = measure(sizes_of(args.device, args.quick), args.device)
    print(f"record: {write_record(record, args.records)}\n{describe_record(record)}")
    return 0 if record.gate.passed else 1


if __name__ == "__main__":
    sys.exit(main())

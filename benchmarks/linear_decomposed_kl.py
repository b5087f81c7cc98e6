"""`linear_decomposed_kl` against plain torch, torch.compile, TRL and Liger: the table of the issue's 'must show'.

    python -m benchmarks.linear_decomposed_kl                 512 tokens, width 1024, vocabulary 151936; bf16 and fp32,
                                                              1 and 2 threads; one record a case
    python -m benchmarks.linear_decomposed_kl --quick         a few seconds, small shapes, for a look

Each case runs in a fresh process and is skipped when a record of the same code, machine and case is there. The gate
comes first: errors of values, hidden gradients and head gradients against fp64, at most twice plain torch's.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, peers
from benchmarks.harness import Check, Gate, Record, Row, Threshold, Timing
from benchmarks.peers import Streams
from vgs_kernels import backend, linear_decomposed_kl
from vgs_kernels.linear_decomposed_kl.api import DEFAULT_MAX_CHUNK_BYTES

NAME = "linear_decomposed_kl"
ISSUE_SHAPE = {"tokens": 512, "width": 1024, "teacher_width": 1024, "vocab": 151936}
GATE_TOKENS = 8
GATE_KINDS = {"random": peers.random_streams, "peaked": peers.peaked_streams}
# The gate's floor is 4 roundings of the largest logit in the accumulation dtype (log ratios are differences of numbers
# that size; the tests of the kernels allow the same), plus an eighth of a rounding of the results' own dtype.
FLOOR_LOGIT_ROUNDINGS, FLOOR_RESULT_ROUNDINGS = 4, 1 / 8
STEERING_WEIGHTS = (0.3, 1.7)
# A logit gradient sums to 0 over the vocabulary, so hidden gradients cancel and feel a drop more than in proportion; in
# bf16, entries that were close to the middle of two numbers are rounded the other way on top of that.
GRADIENT_FILTER = 1.1e-4
COMPILE_LIMIT_S = 150.0
# What no threshold of the issue uses.
_CONTEXT = ("compiled_decomposed", "liger", "bayes_both", "bayes_objective", "matched_both", "matched_objective")
CONTEXT = {"bf16": _CONTEXT, "fp16": _CONTEXT, "fp32": (*_CONTEXT, "trl"), "fp64": (*_CONTEXT, "trl")}
# Seconds of a case at the issue's shape on one core, for the estimate only.
EXPECTED_SECONDS = {"bf16": 170.0, "fp16": 170.0, "fp32": 330.0}


def has_gradient_filter() -> bool:
    return "gradient_filter" in inspect.signature(linear_decomposed_kl).parameters


def run_gate(
    heads: tuple[Tensor, Tensor],
    tokens: int = GATE_TOKENS,
    decomposed: Callable[[str, Streams], tuple[Tensor, ...]] = peers.ours_decomposed,
) -> tuple[Gate, dict[str, float]]:
    """The gate on random and on peaked inputs, and the errors of TRL and Liger at KL(p || q), for the record.

    `decomposed` is what is gated in the place of our call; tests plant errors there.
    """
    checks: list[Check] = []
    peer_errors: dict[str, float] = {}
    for kind, make in GATE_KINDS.items():
        streams = make(tokens, heads)
        oracle = peers.Oracle(streams)
        for decomposition in peers.DECOMPOSITIONS:
            name = f"{kind} {decomposition}"
            checks += _check_decomposition(name, decomposition, streams, oracle, decomposed)
        for name, divergence in PEER_DIVERGENCES.items() if kind == "random" else ():
            try:
                hidden, head = divergence(streams)
            except Exception as error:
                print(f"  {name} does not run: {type(error).__name__}: {error}", flush=True)
                continue
            full = oracle.parts("matched")  # its vis is KL(p || q)
            peer_errors[f"{name} hidden gradient"] = harness.relative_error(hidden, full.hidden["vis"])
            peer_errors[f"{name} head gradient"] = harness.relative_error(oracle.probe(head), full.head["vis"])
    return Gate(tuple(checks)), peer_errors


def narrow_gate(heads: tuple[Tensor, Tensor], tokens: int = GATE_TOKENS) -> Gate:
    """Plain torch with the softmax in 16 bits, held to what we are held to, on the values alone.

    It is faster than with the softmax in fp32. It is a baseline only where it passes.
    """
    streams = peers.random_streams(tokens, heads)
    oracle = peers.Oracle(streams)
    exact = oracle.parts("teacher_prior")
    with torch.no_grad():
        narrow, plain = (peers.naive_parts("teacher_prior", streams, widen) for widen in (False, True))
    floor = floor_of(heads[0].dtype, oracle)
    return Gate(
        tuple(
            Check(f"softmax in 16 bits {name}", *(harness.relative_error(x, truth) for x in (mine, theirs)), floor)
            for name, mine, theirs, truth in zip(("lang", "vis"), narrow, plain, (exact.lang, exact.vis), strict=True)
        )
    )


def floor_of(dtype: torch.dtype, oracle: peers.Oracle) -> float:
    floor = FLOOR_LOGIT_ROUNDINGS * torch.finfo(harness.accumulation_dtype(dtype)).eps * oracle.largest_logit
    return floor + FLOOR_RESULT_ROUNDINGS * torch.finfo(dtype).eps


def _liger_eager(streams: Streams) -> tuple[Tensor, ...]:
    return peers.liger_divergence(streams, compiled=False)


PEER_DIVERGENCES = {"TRL": peers.trl_divergence, "Liger": _liger_eager}


def _check_decomposition(
    name: str,
    decomposition: str,
    streams: Streams,
    oracle: peers.Oracle,
    decomposed: Callable[[str, Streams], tuple[Tensor, ...]],
) -> list[Check]:
    exact = oracle.parts(decomposition)
    floor = floor_of(streams.student.dtype, oracle)

    def check(what: str, result: Tensor, plain: Tensor, truth: Tensor) -> Check:
        errors = harness.relative_error(result, truth), harness.relative_error(plain, truth)
        return Check(f"{name} {what}", *errors, floor)

    with torch.no_grad():
        tokens = peers.ours(decomposition, streams).tokens
        plain_values = peers.naive_parts(decomposition, streams)
    checks = [
        check("lang", tokens.lang, plain_values[0], exact.lang),
        check("vis", tokens.vis, plain_values[1], exact.vis),
    ]
    (lang, lang_head, vis, vis_head), (plain_lang, plain_lang_head, plain_vis, plain_vis_head) = (
        (hidden, oracle.probe(head), other_hidden, oracle.probe(other_head))
        for hidden, head, other_hidden, other_head in (
            decomposed(decomposition, streams),
            peers.naive_decomposed(decomposition, streams),
        )
    )
    checks += [
        check("lang hidden gradient", lang, plain_lang, exact.hidden["lang"]),
        check("lang head gradient", lang_head, plain_lang_head, exact.head["lang"]),
        check("vis hidden gradient", vis, plain_vis, exact.hidden["vis"]),
        check("vis head gradient", vis_head, plain_vis_head, exact.head["vis"]),
    ]

    lang_weight, vis_weight = STEERING_WEIGHTS
    weights = torch.tensor(STEERING_WEIGHTS, device=streams.student.device)
    *hidden, head = peers.ours_objective(decomposition, streams, weights)

    def weighted(lang_part: Tensor, vis_part: Tensor) -> Tensor:
        return lang_weight * lang_part.double() + vis_weight * vis_part.double()

    if decomposition in peers.USES_MASKED_STUDENT:
        plain_hidden = [vis_weight * plain_vis.double(), lang_weight * plain_lang.double()]
        exact_hidden = [vis_weight * exact.hidden["vis"], lang_weight * exact.hidden["lang"]]
    else:
        plain_hidden = [weighted(plain_lang, plain_vis)]
        exact_hidden = [weighted(exact.hidden["lang"], exact.hidden["vis"])]
    checks += [
        check("objective hidden gradient", *triple) for triple in zip(hidden, plain_hidden, exact_hidden, strict=True)
    ]
    plain_head, exact_head = weighted(plain_lang_head, plain_vis_head), weighted(exact.head["lang"], exact.head["vis"])
    checks.append(check("objective head gradient", oracle.probe(head), plain_head, exact_head))
    return checks


def prepare_calls(
    shape: dict[str, int], dtype: str, heads: tuple[Tensor, Tensor], device: str, compile_peers: bool
) -> tuple[dict[str, Callable[[], Any]], dict[str, Row]]:
    """The calls of the case in the order of the turns, and the rows that describe them."""
    tokens, vocab = shape["tokens"], shape["vocab"]
    streams = peers.random_streams(tokens, heads)
    other_teacher = Streams(
        streams.student, streams.masked_student, streams.masked_teacher, streams.teacher, *streams.heads
    )
    peaked = peers.peaked_streams(tokens, heads)
    weights = torch.tensor(STEERING_WEIGHTS, device=device)
    student_head, teacher_head = (head.detach() for head in heads)
    student, teacher = streams.student.detach(), streams.teacher
    logits = student.new_zeros(tokens, vocab)
    hidden_out, head_out = torch.empty_like(student), torch.empty_like(student_head)
    teachers = itertools.cycle([streams, other_teacher])

    calls: dict[str, Callable[[], Any]] = {
        "project_student": lambda: torch.mm(student, student_head.t(), out=logits),
        "project_teacher": lambda: torch.mm(teacher, teacher_head.t(), out=logits),
        "hidden_product": lambda: torch.mm(logits, student_head, out=hidden_out),
        "head_product": lambda: torch.mm(logits.t(), student, out=head_out),
        "naive_decomposed": lambda: peers.naive_decomposed("teacher_prior", streams),
        "naive_monolithic": lambda: peers.naive_monolithic(streams),
    }
    rows = {
        "project_student": Row("project_student", "one projection, student"),
        "project_teacher": Row("project_teacher", "one projection, teacher"),
        "hidden_product": Row("hidden_product", "one hidden-gradient product"),
        "head_product": Row("head_product", "one head-gradient product"),
        "naive_decomposed": Row("naive_decomposed", "plain torch, both components (teacher_prior)"),
        "naive_monolithic": Row("naive_monolithic", "plain torch, monolithic reverse KL"),
    }

    def add(name: str, label: str, call: Callable[[], Any], **fields: Any) -> None:
        calls[name] = call
        rows[name] = Row(name, label, **fields)

    if dtype in ("bf16", "fp16"):
        add(
            "naive_decomposed_narrow", f"the same, softmax in {dtype}",
            lambda: peers.naive_decomposed("teacher_prior", streams, widen=False),
        )  # fmt: skip
        add(
            "naive_monolithic_narrow", f"plain torch, monolithic, softmax in {dtype}",
            lambda: peers.naive_monolithic(streams, widen=False),
        )  # fmt: skip
    if compile_peers:
        compiled = peers.compiled_decomposed("teacher_prior")
        add("compiled_decomposed", "plain torch under torch.compile, both components", lambda: compiled(streams))
    add("trl", "TRL chunked divergence, once per teacher", lambda: peers.trl_divergence(next(teachers)), calls=2)
    add(
        "liger", f"Liger chunked distillation, once per teacher{' (compiled)' if compile_peers else ''}",
        lambda: peers.liger_divergence(next(teachers), compile_peers), calls=2,
    )  # fmt: skip
    for decomposition in peers.DECOMPOSITIONS:
        four = decomposition in peers.USES_MASKED_STUDENT
        add(
            f"{decomposition}_both", f"ours, {decomposition}, both components",
            lambda d=decomposition: peers.ours_decomposed(d, streams),
            floor="floor_8" if four else "floor_7",
            bytes_moved=traffic(shape, dtype, device, decomposition, combined=False),
        )  # fmt: skip
        add(
            f"{decomposition}_objective", f"ours, {decomposition}, objective",
            lambda d=decomposition: peers.ours_objective(d, streams, weights),
            floor="floor_8" if four else "floor_5",
            bytes_moved=traffic(shape, dtype, device, decomposition, combined=True),
        )  # fmt: skip
    filtered = {"filtered_both": "both components", "filtered_objective": "objective"}
    for name, what in filtered.items():
        label = f"ours, teacher_prior, {what}, gradient_filter={GRADIENT_FILTER:g}, peaked inputs"
        if not has_gradient_filter():
            rows[name] = Row(name, label, floor="floor_3", note="not available: this version has no gradient_filter")
        elif name == "filtered_both":
            add(
                name, label,
                lambda: peers.ours_decomposed("teacher_prior", peaked, gradient_filter=GRADIENT_FILTER),
                floor="floor_3",
            )  # fmt: skip
        else:
            add(
                name, label,
                lambda: peers.ours_objective("teacher_prior", peaked, weights, gradient_filter=GRADIENT_FILTER),
                floor="floor_3",
            )  # fmt: skip
    return calls, rows


BYTE_MODEL = (
    "ours: logits written once and read twice (values, gradients) per stream, logit gradients written once and read "
    "by two products; per chunk of tokens both heads read once and, per component product, the student head read once "
    "and its gradient read and written"
)


def traffic(shape: dict[str, int], dtype: str, device: str, decomposition: str, combined: bool) -> int:
    """Bytes that our call moves through memory by `BYTE_MODEL`."""
    itemsize = harness.DTYPES[dtype].itemsize
    logit_itemsize = max(4, itemsize) if device == "cuda" else itemsize  # GPUs project 16-bit operands into fp32
    streams = 4 if decomposition in peers.USES_MASKED_STUDENT else 3
    gradients = 1 if combined and streams == 3 else 2
    products = 1 if combined else 2
    entries = shape["tokens"] * shape["vocab"]
    logits = entries * (3 * streams * logit_itemsize + 3 * gradients * itemsize)
    student_head, teacher_head = (shape["vocab"] * shape[width] * itemsize for width in ("width", "teacher_width"))
    chunk_tokens = max(1, DEFAULT_MAX_CHUNK_BYTES[device] // (streams * shape["vocab"] * logit_itemsize))
    chunks = math.ceil(shape["tokens"] / chunk_tokens)
    return logits + chunks * (student_head + teacher_head + 3 * products * student_head)


def floor_rows(timings: Mapping[str, Timing]) -> list[Row]:
    """The products alone: 3 or 4 projections, and 1 or 2 pairs of hidden and head product."""
    parts = [timings[n].seconds for n in ("project_student", "project_teacher", "hidden_product", "head_product")]
    counts = {  # student projections, teacher projections, pairs
        "floor_3": (1, 2, 0, "floor: 3 projections alone"),
        "floor_5": (1, 2, 1, "floor: 5 products (objective, teacher_prior)"),
        "floor_7": (1, 2, 2, "floor: 7 products (both components, teacher_prior)"),
        "floor_8": (2, 2, 2, "floor: 8 products (bayes, matched)"),
    }
    return [
        Row(name, label, [s * student + t * teacher + pairs * (h + w) for s, t, h, w in zip(*parts, strict=False)])
        for name, (student, teacher, pairs, label) in counts.items()
    ]


def filter_facts(shape: dict[str, int], heads: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """What the filter changes at full size, relative to the norm of the unfiltered gradients, per gradient."""
    peaked = peers.peaked_streams(shape["tokens"], heads)
    with torch.no_grad():
        entropy = peers.ours("teacher_prior", peaked).tokens.entropy.mean().item()
    facts: dict[str, Any] = {"peaked_student_entropy": entropy, "gradient_filter": GRADIENT_FILTER}
    if has_gradient_filter():
        whole = peers.ours_decomposed("teacher_prior", peaked)
        filtered = peers.ours_decomposed("teacher_prior", peaked, gradient_filter=GRADIENT_FILTER)
        names = ("lang hidden", "lang head", "vis hidden", "vis head")
        pairs = zip(names, filtered, whole, strict=True)
        facts["gradient_filter_change"] = {name: harness.relative_error(a, b) for name, a, b in pairs}
    return facts


def thresholds(record: Record, dtype: str) -> list[Threshold]:
    """The issue's 'must show' at its shape, against the faster spelling of plain torch."""
    at_least, objective_limit = (4.0, 0.6) if dtype == "bf16" else (2.0, 0.95)
    naive, monolithic = (fastest(record, name) for name in ("naive_decomposed", "naive_monolithic"))
    peaks = [
        row.peak_bytes for name in ("both", "objective")
        if (row := record.row(f"teacher_prior_{name}")) is not None and row.peak_bytes is not None
    ]  # fmt: skip
    found = [
        Threshold(
            "teacher_prior, both components: times faster than plain torch, both components",
            record.ratio(naive, "teacher_prior_both"), at_least, at_least=True,
        ),
        Threshold(
            "teacher_prior, objective: time over plain torch's monolithic reverse KL",
            record.ratio("teacher_prior_objective", monolithic), objective_limit,
        ),
        Threshold(
            "teacher_prior: peak memory above inputs and gradients, MiB",
            max(peaks) / harness.MIB if peaks else None, 128,
        ),
    ]  # fmt: skip
    if dtype == "bf16":
        text = "teacher_prior, both components: times faster than TRL called twice"
        found.append(Threshold(text, record.ratio("trl", "teacher_prior_both"), 8.0, at_least=True))
    for name, what in (("filtered_both", "both components"), ("filtered_objective", "objective")):
        text = f"gradient_filter on peaked inputs, {what}: time over the 3 projections alone"
        found.append(Threshold(text, record.ratio(name, "floor_3"), 1.5))
    change = record.facts.get("gradient_filter_change")
    largest = max(change.values()) if change else None
    entropy = record.facts["peaked_student_entropy"]
    return [
        *found,
        Threshold("gradient_filter: largest relative change of a gradient", largest, 1e-3),
        Threshold("peaked inputs: mean student entropy, nats", entropy, 2.0),
    ]


def fastest(record: Record, name: str) -> str:
    """The faster of a plain-torch peer's spellings that pass the gate: softmax in fp32, or in the inputs' 16 bits."""
    rows = [row for row in (record.row(name), record.row(f"{name}_narrow")) if row is not None and row.median]
    return min(rows, key=lambda row: row.median or math.inf).name if rows else name


def measure(shape: dict[str, int], dtype: str, threads: int, device: str, args: argparse.Namespace) -> Record:
    """Gate, then turns, then the record of one case. A red gate ends it before any timing."""
    start = time.perf_counter()
    heads = peers.random_heads(shape["width"], shape["teacher_width"], shape["vocab"], harness.DTYPES[dtype], device)
    gate, peer_errors = run_gate(heads, min(GATE_TOKENS, shape["tokens"]))
    print(gate.describe(), flush=True)
    record = Record(
        NAME, harness.case_of(shape, dtype, threads), gate, [], harness.environment(device), sources=digest(),
        facts={
            "backend": backend.resolve("decomposed_kl", torch.device(device)),
            "peer_errors_at_kl": peer_errors,
            "memory": harness.MEMORY_METHOD[device],
            "bytes": BYTE_MODEL,
            "gate_seconds": time.perf_counter() - start,
        },
    )  # fmt: skip
    if not gate.passed:
        return record
    calls, rows = prepare_calls(shape, dtype, heads, device, compile_peers=not args.no_compile)
    if dtype in ("bf16", "fp16"):
        drop_narrow(calls, rows, narrow_gate(heads, min(GATE_TOKENS, shape["tokens"])))
    compile_first(calls, rows, record.facts, device)
    timings = harness.interleaved(
        calls, min_rounds=args.rounds, max_rounds=3 * args.rounds, budget_s=args.budget, device=device,
        warm_up=[name for name in calls if device == "cuda" or name.endswith(("_product", "_student", "_teacher"))],
        context=CONTEXT[dtype],
        on_call=lambda name, seconds: print(f"  {name}: {harness.seconds_text(seconds)}", flush=True),
    )  # fmt: skip
    for name, timing in timings.items():
        row = rows[name]
        row.seconds, row.peak_bytes, row.note = timing.seconds, timing.peak_bytes, timing.problem or row.note
    record.rows = [*floor_rows(timings), *rows.values()]
    naive, monolithic = (fastest(record, name) for name in ("naive_decomposed", "naive_monolithic"))
    for row in record.rows:
        if row.name in ("teacher_prior_both", "trl", "liger", "compiled_decomposed"):
            row.baseline = naive
        elif row.name == "teacher_prior_objective":
            row.baseline = monolithic
    calls.clear()
    record.facts |= filter_facts(shape, heads)
    if shape == ISSUE_SHAPE and device == "cpu" and dtype in ("bf16", "fp32"):
        record.thresholds = thresholds(record, dtype)
    record.facts["case_seconds"] = time.perf_counter() - start
    return record


def drop_narrow(calls: dict[str, Callable[[], Any]], rows: dict[str, Row], gate: Gate) -> None:
    """Take the 16-bit softmax out of the turns where it fails the gate, and say by how much."""
    if not gate.passed:
        worst = max(check.error / check.allowed for check in gate.checks)
        for name in ("naive_decomposed_narrow", "naive_monolithic_narrow"):
            del calls[name]
            rows[name].note = f"not timed: fails the gate, values off by {worst:.0f}× what is allowed"


def compile_first(
    calls: dict[str, Callable[[], Any]], rows: dict[str, Row], facts: dict[str, Any], device: str
) -> None:
    """Compile what compiles; a peer that fails or takes too long is not timed, and its row says why."""
    for name in ("compiled_decomposed", "liger"):
        if name not in calls:
            continue
        start = time.perf_counter()
        try:
            with harness.time_limit(COMPILE_LIMIT_S):
                calls[name]()
                harness.synchronize(device)
        except Exception as error:
            del calls[name]
            rows[name].note = f"skipped: {type(error).__name__}: {error}".splitlines()[0]
        facts[f"{name}_first_call_seconds"] = time.perf_counter() - start


def digest() -> str:
    return harness.source_digest(Path(__file__), Path(peers.__file__))


def expected_seconds(shape: dict[str, int], dtype: str, threads: int) -> float:
    size = shape["tokens"] * shape["width"] * shape["vocab"] / (512 * 1024 * 151936)
    return 30 + EXPECTED_SECONDS.get(dtype, 600.0) * size / min(threads, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.case_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--teacher-width", type=int, help="default: the student's")
    parser.add_argument("--vocab", type=int, default=151936)
    args = parser.parse_args(arguments)
    if args.quick:
        args.tokens, args.width, args.vocab, args.no_compile, args.budget = 64, 256, 8192, True, 0.2
    shape = {
        "tokens": args.tokens,
        "width": args.width,
        "teacher_width": args.teacher_width or args.width,
        "vocab": args.vocab,
    }
    return harness.drive(
        "benchmarks.linear_decomposed_kl",
        args,
        shape,
        digest(),
        lambda dtype, threads: measure(shape, dtype, threads, args.device, args),
        lambda dtype, threads: expected_seconds(shape, dtype, threads),
    )


if __name__ == "__main__":
    sys.exit(main())

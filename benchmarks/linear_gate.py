"""The gate of `linear_decomposed_kl`: values, hidden and head gradients against fp64, beside plain torch's errors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness.gates import Check, Gate, accumulation_dtype, relative_error
from benchmarks.inputs import DECOMPOSITIONS, USES_MASKED_STUDENT, Streams, peaked_streams, random_streams
from benchmarks.oracle import Oracle
from benchmarks.truth import Result

GATE_TOKENS = 8
GATE_KINDS = {"random": random_streams, "peaked": peaked_streams}
# The gate's floor is 4 roundings of the largest logit in the accumulation dtype (log ratios are differences of numbers
# that size; the tests of the kernels allow the same), plus an eighth of a rounding of the results' own dtype.
FLOOR_LOGIT_ROUNDINGS, FLOOR_RESULT_ROUNDINGS = 4, 1 / 8
STEERING_WEIGHTS = (0.3, 1.7)


def run_gate(
    heads: tuple[Tensor, Tensor],
    tokens: int = GATE_TOKENS,
    decomposed: Callable[[str, Streams], tuple[Tensor, ...]] = peers.ours_decomposed,
) -> tuple[Gate, dict[str, dict[str, float]]]:
    """The gate on random and on peaked inputs, and the gradients' errors at KL(p || q) of ours, TRL and Liger.

    `decomposed` is what is gated in the place of our call; tests plant errors there.
    """
    checks: list[Check] = []
    errors_at_kl: dict[str, dict[str, float]] = {}
    for kind, make in GATE_KINDS.items():
        streams = make(tokens, heads)
        oracle = Oracle(streams)
        for decomposition in DECOMPOSITIONS:
            name = f"{kind} {decomposition}"
            checks += _check_decomposition(name, decomposition, streams, oracle, decomposed)
        for name, divergence in REVERSE_KL.items() if kind == "random" else ():
            try:
                _loss, (hidden,), head = divergence(streams)
            except Exception as error:
                print(f"  {name} does not run: {type(error).__name__}: {error}", flush=True)
                continue
            full = oracle.parts("matched")  # its vis is KL(p || q)
            errors_at_kl[name] = {
                "hidden_gradient": relative_error(hidden, full.hidden["vis"]),
                "head_gradient": relative_error(oracle.probe(head), full.head["vis"]),
            }
    return Gate(tuple(checks)), errors_at_kl


def narrow_gate(heads: tuple[Tensor, Tensor], tokens: int = GATE_TOKENS) -> Gate:
    """Plain torch with the softmax in 16 bits, held to what we are held to, on the values alone.

    It is faster than with the softmax in fp32. It is a baseline only where it passes.
    """
    streams = random_streams(tokens, heads)
    oracle = Oracle(streams)
    exact = oracle.parts("teacher_prior")
    with torch.no_grad():
        narrow, plain = (peers.naive_parts("teacher_prior", streams, widen) for widen in (False, True))
    floor = floor_of(heads[0].dtype, oracle)
    return Gate(
        tuple(
            Check(f"softmax in 16 bits {name}", *(relative_error(x, truth) for x in (mine, theirs)), floor)
            for name, mine, theirs, truth in zip(("lang", "vis"), narrow, plain, (exact.lang, exact.vis), strict=True)
        )
    )


def floor_of(dtype: torch.dtype, oracle: Oracle) -> float:
    floor = FLOOR_LOGIT_ROUNDINGS * torch.finfo(accumulation_dtype(dtype)).eps * oracle.largest_logit
    return floor + FLOOR_RESULT_ROUNDINGS * torch.finfo(dtype).eps


def _liger_eager(streams: Streams) -> Result:
    return peers.liger_reverse_kl(streams, compiled=False)


REVERSE_KL = {"teacher_prior_both": peers.ours_reverse_kl, "trl": peers.trl_reverse_kl, "liger": _liger_eager}


def _check_decomposition(
    name: str,
    decomposition: str,
    streams: Streams,
    oracle: Oracle,
    decomposed: Callable[[str, Streams], tuple[Tensor, ...]],
) -> list[Check]:
    """Values, gradients of both components, gradients of their objective."""
    exact = oracle.parts(decomposition)
    floor = floor_of(streams.student.dtype, oracle)

    def check(what: str, result: Tensor, plain: Tensor, truth: Tensor) -> Check:
        return Check(f"{name} {what}", relative_error(result, truth), relative_error(plain, truth), floor)

    with torch.no_grad():
        tokens = peers.ours(decomposition, streams).tokens
        plain_values = peers.naive_parts(decomposition, streams)
    lang, lang_head, vis, vis_head = _probed(oracle, decomposed(decomposition, streams))
    plain = _probed(oracle, peers.naive_decomposed(decomposition, streams))
    return [
        check("lang", tokens.lang, plain_values[0], exact.lang),
        check("vis", tokens.vis, plain_values[1], exact.vis),
        check("lang hidden gradient", lang, plain[0], exact.hidden["lang"]),
        check("lang head gradient", lang_head, plain[1], exact.head["lang"]),
        check("vis hidden gradient", vis, plain[2], exact.hidden["vis"]),
        check("vis head gradient", vis_head, plain[3], exact.head["vis"]),
        *(check(*triple) for triple in _objective_gradients(decomposition, streams, oracle, plain)),
    ]


def _probed(oracle: Oracle, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hidden gradients as they are, head gradients through the oracle's probes."""
    lang, lang_head, vis, vis_head = gradients
    return lang, oracle.probe(lang_head), vis, oracle.probe(vis_head)


def _objective_gradients(
    decomposition: str, streams: Streams, oracle: Oracle, plain: tuple[Tensor, ...]
) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """What, ours, plain torch's, the truth."""
    exact = oracle.parts(decomposition)
    lang_weight, vis_weight = STEERING_WEIGHTS
    weights = torch.tensor(STEERING_WEIGHTS, device=streams.student.device)
    *hidden, head = peers.ours_objective(decomposition, streams, weights)

    def weighted(lang: Tensor, vis: Tensor) -> Tensor:
        return lang_weight * lang.double() + vis_weight * vis.double()

    if decomposition in USES_MASKED_STUDENT:
        plain_hidden = [vis_weight * plain[2].double(), lang_weight * plain[0].double()]
        exact_hidden = [vis_weight * exact.hidden["vis"], lang_weight * exact.hidden["lang"]]
    else:
        plain_hidden = [weighted(plain[0], plain[2])]
        exact_hidden = [weighted(exact.hidden["lang"], exact.hidden["vis"])]
    found = [("objective hidden gradient", *three) for three in zip(hidden, plain_hidden, exact_hidden, strict=True)]
    plain_head, exact_head = weighted(plain[1], plain[3]), weighted(exact.head["lang"], exact.head["vis"])
    return [*found, ("objective head gradient", oracle.probe(head), plain_head, exact_head)]

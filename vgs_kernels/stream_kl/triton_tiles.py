"""What the Triton kernels of `stream_kl` share: tiles of logits and what lies between them and z. The legend is in
`triton.py`."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (Triton reads the annotations of kernels itself.)

from __future__ import annotations

import math

import triton
import triton.language as tl

from .reference import ANCHOR, LOG_SUM, NORMALIZER, STATISTICS, TOP, VALUES

KINDS = {"reverse_kl": 0, "prior": 1, "visual": 2}  # two, three and four streams
PLAIN_FORM, SCALED_FORM, SOFTCAP_FORM = range(3)  # what lies between a raw logit and z

# Python numbers are visible to kernels only as constexpr.
REVERSE_KL = tl.constexpr(KINDS["reverse_kl"])
VISUAL = tl.constexpr(KINDS["visual"])
SCALED = tl.constexpr(SCALED_FORM)
SOFTCAPPED = tl.constexpr(SOFTCAP_FORM)
VALUE_COLUMNS = tl.constexpr(VALUES)
STATISTIC_COLUMNS = tl.constexpr(STATISTICS)
OF_ANCHORS = tl.constexpr(ANCHOR)
OF_LOG_SUMS = tl.constexpr(LOG_SUM)
OF_TOPS = tl.constexpr(TOP)
OF_NORMALIZERS = tl.constexpr(NORMALIZER)
LOG2E = tl.constexpr(math.log2(math.e))  # exp(x) = exp2(x * LOG2E): GPUs have exp2 in hardware
LN2 = tl.constexpr(math.log(2.0))
INF = tl.constexpr(math.inf)
SMALLEST = tl.constexpr(2.0**-126)  # normal float32 number: what lies below is no mass


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _log(x):
    return tl.log2(x) * LN2


@triton.jit
def _tanh(x):
    # From exp2, because libdevice.tanh has no interpreter. 1 - 2 / (exp(2x) + 1) loses all digits near 0: a series
    # there, whose next term is under 1e-8 relative at 0.25.
    y = x * x
    series = x * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0)))))
    return tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0))


@triton.jit
def _transform(x, multiplier, cap, FORM: tl.constexpr):
    """Raw logits to z: x, x * multiplier or cap * tanh(x * multiplier); temperature is folded into both constants."""
    z = x.to(tl.float32)
    if FORM == SCALED:
        z = z * multiplier
    elif FORM == SOFTCAPPED:
        z = cap * _tanh(z * multiplier)
    return z


@triton.jit
def _smooth(z, normalizer, share, SMOOTHED: tl.constexpr, PTX: tl.constexpr):
    """log((1 - epsilon) * softmax + epsilon / V) of a teacher's z: its normalizer is that of the row, over 1 - epsilon;
    `share` is epsilon / V."""
    if SMOOTHED:
        x = _exp(z - normalizer) + share
        if PTX:  # one instruction, within 2e-7 where x is near 1; tl.log2 takes 26
            z = LN2 * tl.inline_asm_elementwise(
                "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
            )  # fmt: skip
        else:
            z = _log(x)
    return z


@triton.jit
def _columns(start, LOADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Of a tile, [LOADS, LANES * VECTOR]: VECTOR adjacent columns a thread and load. In three dimensions Triton 3.6
    spreads the loads over the threads, and every reduction within a lane crosses them."""
    piece = tl.arange(0, LOADS)[:, None] * (LANES * VECTOR)
    return start + piece + tl.arange(0, LANES * VECTOR)[None, :]


@triton.jit
def _inside(columns, V, TAIL: tl.constexpr):
    """Which columns lie before V; groups of TAIL columns (a divisor of V) are in or out together."""
    return tl.max_constancy(columns < V, [1, TAIL])


@triton.jit
def _row(X, row, stride, VECTOR: tl.constexpr):
    """Start of a row, in 64 bits: row * stride passes 2^31. The launcher has checked that VECTOR divides it."""
    return tl.multiple_of(X + row * stride, VECTOR * (X.dtype.element_ty.primitive_bitwidth // 8))


@triton.jit
def _ratio(ur, un, zq, guard, GUARDED: tl.constexpr, CAREFUL: tl.constexpr):
    """log p0 - log r up to a constant, of the distances from the anchors; with a guard without one, clamped and cut."""
    ratio = un - ur
    offset, bound, floor = guard
    if GUARDED:
        ratio -= offset
    if CAREFUL:
        ratio = tl.where(un == -INF, -INF, ratio)  # no mass in p0: none in q*, whatever r has there
    if GUARDED:
        ratio = tl.minimum(tl.maximum(ratio, -bound, tl.PropagateNan.ALL), bound, tl.PropagateNan.ALL)
        ratio = tl.where(zq >= floor, ratio, 0.0)
    return ratio


@triton.jit
def _guard(STATISTICS, row, bound, log_floor, GUARDED: tl.constexpr):
    """(offset, bound, floor) of `_ratio`, and the anchors of r and n that the offset goes with."""
    guard, fixed = (0.0, 0.0, 0.0), (0.0, 0.0)
    if GUARDED:
        line = STATISTICS + row * STATISTIC_COLUMNS
        offset = tl.load(line + OF_LOG_SUMS + 2) - tl.load(line + OF_LOG_SUMS + 1)
        offset = tl.where(tl.abs(offset) == INF, 0.0, offset)  # a stream without mass has -inf everywhere anyway
        guard = (offset, bound, tl.load(line + OF_ANCHORS) + (tl.load(line + OF_TOPS) + log_floor))
        fixed = (tl.load(line + OF_ANCHORS + 1), tl.load(line + OF_ANCHORS + 2))
    return guard, fixed


@triton.jit
def _normalizers(STATISTICS, row, SMOOTHED: tl.constexpr):
    """What `_smooth` subtracts from z of q and r."""
    found = (0.0, 0.0)
    if SMOOTHED:
        line = STATISTICS + row * STATISTIC_COLUMNS + OF_NORMALIZERS
        found = (tl.load(line), tl.load(line + 1))
    return found

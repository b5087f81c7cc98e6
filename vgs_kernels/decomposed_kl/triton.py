"""Triton backend of `decomposed_kl`, for CUDA and ROCm: the two functions of `decomposed_kl/reference.py`.

`divergences` reads every stream once. `logit_gradients` is a second look, in place where the caller wants it. fp32,
bf16 and fp16 logits, fp32 inside; fp64 belongs to the reference backend.

Legend, inside kernels:
    p q r n         streams: student, teacher, masked teacher, masked student ("n": no image)
    P Q R N         their pointers; suffix _s: row stride in elements, _w: width of an output
    z               transformed logits, softcap(scale * x) / temperature
    m s             running maximum of z, running sum of exp(z - m)
    zp zq ...       z of a stream; ap an = z - m of the student's; ep en = exp(ap), exp(an)
    self            sum of ep * ap
    pq pr pn nr     a pair of streams: the sum of ep * (ap - (zq - c_pq)) and so on
    c_pq c_pr ...   anchor of a pair: the second stream's z where the first has its maximum, 0 where that is not finite
    hole            largest zp where the other stream is -inf: student mass there makes the divergence infinite
    tile            [LOADS, LANES, VECTOR] consecutive columns; reductions over the first and last axis stay in a thread

Per-thread accumulators are merged once, when the row (or the program's part of it) ends: a row has no barrier.

Determinism and races: every program writes only its own row's results, or its own line of the workspace, and nobody
reads what another program of the same launch writes. There are no atomics; the second stage sums in a fixed order.
In `logit_gradients` each element is loaded by the program that overwrites it, before it does.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (Triton reads the annotations of kernels itself.)

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_config as config
from .old_types import LogitTransform
from .reference import STATISTICS, VALUES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DECOMPOSITION_CODES = {"teacher_prior": 0, "bayes": 1, "matched": 2}
PLAIN_FORM, SCALED_FORM, SOFTCAP_FORM = range(3)  # what lies between a raw logit and z

# Python numbers are visible to kernels only as constexpr.
TEACHER_PRIOR = tl.constexpr(0)
BAYES = tl.constexpr(1)
MATCHED = tl.constexpr(2)
SCALED = tl.constexpr(SCALED_FORM)
SOFTCAPPED = tl.constexpr(SOFTCAP_FORM)
LOG2E = tl.constexpr(math.log2(math.e))  # exp(x) = exp2(x * LOG2E): GPUs have exp2 in hardware
LN2 = tl.constexpr(math.log(2.0))
INF = tl.constexpr(math.inf)
SMALLEST = tl.constexpr(2.0**-126)  # normal float32 number
WORKSPACE_STATES = 21  # numbers that describe a part of a row, the tuple `state`
STATES = tl.constexpr(WORKSPACE_STATES)


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


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
def _columns(start, LOADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    piece = tl.arange(0, LOADS)[:, None, None] * (LANES * VECTOR)
    lane = tl.arange(0, LANES)[None, :, None] * VECTOR
    return start + piece + lane + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def _inside(columns, V, TAIL: tl.constexpr):
    """Which columns lie before V; groups of TAIL columns (a divisor of V) are in or out together."""
    return tl.max_constancy(columns < V, [1, 1, TAIL])


@triton.jit
def _row(X, row, stride, VECTOR: tl.constexpr):
    """Start of a row, in 64 bits: row * stride passes 2^31. The launcher has checked that VECTOR divides it."""
    return tl.multiple_of(X + row * stride, VECTOR * (X.dtype.element_ty.primitive_bitwidth // 8))


@triton.jit
def _sum(tile):
    return tl.sum(tl.sum(tile, 2), 0)


@triton.jit
def _max(tile):
    return tl.max(tl.max(tile, 2), 0)


# Forward: the state of a part of a row, and how parts grow and merge.


@triton.jit
def _rise(m, top):
    """From maximum m to `top`: what to subtract from z, the factor of old weights, the shift of old distances.

    A stream without mass yet has m = -inf: it subtracts 0 and shifts by 0, never -inf - -inf.
    """
    anchor = tl.where(top == -INF, 0.0, top)
    return anchor, _exp(m - anchor), tl.where(m == -INF, 0.0, anchor - m)


@triton.jit
def _stream(z, m, s):
    """One stream meets a tile. Returns distances, weights, new maximum, new sum, and `_rise` of the old ones."""
    top = tl.maximum(m, _max(z))
    anchor, factor, shift = _rise(m, top)
    a = z - anchor[None, :, None]
    e = _exp(a)
    return a, e, top, s * factor + _sum(e), factor, shift


@triton.jit
def _moved(total, s, factor, shift):
    # Weight that vanished takes its sum along, even one that overflowed: 0 * inf would be NaN.
    return tl.where(factor > 0, (total - s * shift) * factor, 0.0)


@triton.jit
def _pair(total, c, hole, m, a, e, z, s, factor, shift):
    """A pair meets a tile: a and e are the first stream's, z the second's; s, factor, shift describe the mass before.

    Where the tile raised the first stream's maximum, the anchor moves to the z found there. The hole is found as a + m,
    not from the first stream's z: keeping that tile alive as well costs `bayes` 16 registers.
    """
    there = z != -INF
    candidate = _max(tl.where(a == 0, z, -INF))
    raised = (shift != 0) | (factor == 0)  # the first finite entry shifts by 0
    new = tl.where(raised, tl.where(tl.abs(candidate) == INF, 0.0, candidate), c)
    d = a - (z - new[None, :, None])
    total = _moved(total, s, factor, shift - (new - c)) + _sum(tl.where((e > 0) & there, e * d, 0.0))
    return total, new, tl.maximum(hole, _max(tl.where(there, -INF, a)) + m)


@triton.jit
def _grow(state, zp, zq, zr, zn, KIND: tl.constexpr):
    """The state after one more tile."""
    mp, sp, mq, sq, mr, sr, mn, sn, self, pq, pr, pn, nr, c_pq, c_pr, c_pn, c_nr, h_pq, h_pr, h_pn, h_nr = state
    # In this order a stream's tile dies before the next is needed: the registers of `bayes` depend on it.
    ap, ep, mp, sp_new, fp, dp = _stream(zp, mp, sp)
    self = _moved(self, sp, fp, dp) + _sum(tl.where(ep > 0, ep * ap, 0.0))
    pq, c_pq, h_pq = _pair(pq, c_pq, h_pq, mp, ap, ep, zq, sp, fp, dp)
    _aq, _eq, mq, sq, _fq, _dq = _stream(zq, mq, sq)
    if KIND == BAYES:
        pn, c_pn, h_pn = _pair(pn, c_pn, h_pn, mp, ap, ep, zn, sp, fp, dp)
    if KIND != MATCHED:
        pr, c_pr, h_pr = _pair(pr, c_pr, h_pr, mp, ap, ep, zr, sp, fp, dp)
    if KIND != TEACHER_PRIOR:
        an, en, mn, sn_new, fn, dn = _stream(zn, mn, sn)
        nr, c_nr, h_nr = _pair(nr, c_nr, h_nr, mn, an, en, zr, sn, fn, dn)
        sn = sn_new
    _ar, _er, mr, sr, _fr, _dr = _stream(zr, mr, sr)
    return mp, sp_new, mq, sq, mr, sr, mn, sn, self, pq, pr, pn, nr, c_pq, c_pr, c_pn, c_nr, h_pq, h_pr, h_pn, h_nr


@triton.jit
def _gather(m, s):
    """Merge one stream over all parts."""
    top = tl.max(m, 0)
    _anchor, factor, shift = _rise(m, top)
    return top, tl.sum(s * factor, 0), factor, shift


@triton.jit
def _gather_pair(total, c, m, top, s, factor, shift):
    """Merge a pair over all parts; the anchor is that of a part which holds the first stream's maximum."""
    new = tl.max(tl.where(m == top, c, -INF), 0)
    return tl.sum(_moved(total, s, factor, shift - (new - c)), 0), new


@triton.jit
def _merge(state):
    """One state, of scalars, from a vector of states of disjoint parts."""
    mp, sp, mq, sq, mr, sr, mn, sn, self, pq, pr, pn, nr, c_pq, c_pr, c_pn, c_nr, h_pq, h_pr, h_pn, h_nr = state
    top_p, sp_all, fp, dp = _gather(mp, sp)
    mq, sq, _fq, _dq = _gather(mq, sq)
    mr, sr, _fr, _dr = _gather(mr, sr)
    top_n, sn_all, fn, dn = _gather(mn, sn)
    self = tl.sum(_moved(self, sp, fp, dp), 0)
    pq, c_pq = _gather_pair(pq, c_pq, mp, top_p, sp, fp, dp)
    pr, c_pr = _gather_pair(pr, c_pr, mp, top_p, sp, fp, dp)
    pn, c_pn = _gather_pair(pn, c_pn, mp, top_p, sp, fp, dp)
    nr, c_nr = _gather_pair(nr, c_nr, mn, top_n, sn, fn, dn)
    h_pq, h_pr, h_pn, h_nr = tl.max(h_pq, 0), tl.max(h_pr, 0), tl.max(h_pn, 0), tl.max(h_nr, 0)
    return (
        top_p, sp_all, mq, sq, mr, sr, top_n, sn_all, self, pq, pr, pn, nr, c_pq, c_pr, c_pn, c_nr, h_pq, h_pr, h_pn,
        h_nr,
    )  # fmt: skip


@triton.jit
def _log(x):
    return tl.log2(x) * LN2


@triton.jit
def _divergence(mean, s_from, s_to, m_to, c, hole, normalizer):
    """KL from a finished pair; +inf where the first distribution has mass that the second lacks."""
    kl = mean + _log(s_to / s_from) + (m_to - c)  # one logarithm of the ratio: two would cancel
    kl = tl.where(_exp(hole - normalizer) > 0, INF, kl)
    return tl.where(s_from == 0, 0.0, kl)  # no mass at all: nothing to sum


@triton.jit
def _finish(state, row, active, OUT, STATISTICS, KIND: tl.constexpr):
    """Write the row's values and statistics, 0 for a skipped row."""
    mp, sp, mq, sq, mr, sr, mn, sn, self, pq, pr, pn, nr, c_pq, c_pr, c_pn, c_nr, h_pq, h_pr, h_pn, h_nr = state
    inverse_p = tl.where(active & (sp != 0), 1.0 / sp, 0.0)
    inverse_n = tl.where(active & (sn != 0), 1.0 / sn, 0.0)
    norm_p, norm_n = mp + _log(sp), mn + _log(sn)
    prior, shift, masked = 0.0, 0.0, 0.0
    full = _divergence(pq * inverse_p, sp, sq, mq, c_pq, h_pq, norm_p)
    if KIND != MATCHED:
        prior = _divergence(pr * inverse_p, sp, sr, mr, c_pr, h_pr, norm_p)
    if KIND == BAYES:
        shift = _divergence(pn * inverse_p, sp, sn, mn, c_pn, h_pn, norm_p)
    if KIND != TEACHER_PRIOR:
        masked = _divergence(nr * inverse_n, sn, sr, mr, c_nr, h_nr, norm_n)
    entropy = tl.where(sp == 0, 0.0, _log(sp) - self * inverse_p)
    line = OUT + row * 5
    tl.store(line, tl.where(active, entropy, 0.0))
    tl.store(line + 1, tl.where(active, full, 0.0))
    tl.store(line + 2, tl.where(active, prior, 0.0))
    tl.store(line + 3, tl.where(active, shift, 0.0))
    tl.store(line + 4, tl.where(active, masked, 0.0))
    line = STATISTICS + row * 13
    tl.store(line, tl.where(active & (mp != -INF), mp, 0.0))
    tl.store(line + 1, tl.where(active & (mn != -INF), mn, 0.0))
    tl.store(line + 2, inverse_p)
    tl.store(line + 3, inverse_n)
    tl.store(line + 4, tl.where(active, c_pq, 0.0))
    tl.store(line + 5, tl.where(active, c_pr, 0.0))
    tl.store(line + 6, tl.where(active, c_pn, 0.0))
    tl.store(line + 7, tl.where(active, c_nr, 0.0))
    tl.store(line + 8, self * inverse_p)
    tl.store(line + 9, pq * inverse_p)
    tl.store(line + 10, pr * inverse_p)
    tl.store(line + 11, pn * inverse_p)
    tl.store(line + 12, nr * inverse_n)


@triton.jit
def _load(X, columns, inside, multiplier, cap, FORM: tl.constexpr, MASKED: tl.constexpr):
    """A tile of z; -inf outside, after the transform (tanh would make it finite)."""
    if MASKED:
        z = _transform(tl.load(X + columns, mask=inside, other=0.0), multiplier, cap, FORM)
        z = tl.where(inside, z, -INF)
    else:
        z = _transform(tl.load(X + columns), multiplier, cap, FORM)
    return z


@triton.jit
def _read(
    P, Q, R, N, columns, inside, student_multiplier, student_cap, teacher_multiplier, teacher_cap,
    KIND: tl.constexpr, STUDENT_FORM: tl.constexpr, TEACHER_FORM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    zp = _load(P, columns, inside, student_multiplier, student_cap, STUDENT_FORM, MASKED)
    zq = _load(Q, columns, inside, teacher_multiplier, teacher_cap, TEACHER_FORM, MASKED)
    zr = _load(R, columns, inside, teacher_multiplier, teacher_cap, TEACHER_FORM, MASKED)
    zn = zp
    if KIND != TEACHER_PRIOR:
        zn = _load(N, columns, inside, student_multiplier, student_cap, STUDENT_FORM, MASKED)
    return zp, zq, zr, zn


FORWARD_ARGUMENTS = (
    "P", "Q", "R", "N", "WEIGHTS", "OUT", "STATISTICS", "WORKSPACE", "P_s", "Q_s", "R_s", "N_s", "V", "tiles",
    "splits", "student_multiplier", "student_cap", "teacher_multiplier", "teacher_cap",
)  # fmt: skip


# Nothing is specialised on argument values: what the code depends on is in the constants, so that the compiled variants
# are the ones the compile gate checks, and a new stride or vocabulary does not compile anew.
@triton.jit(do_not_specialize=FORWARD_ARGUMENTS)
def divergences_kernel(
    P,  # (tokens, >= V)
    Q,  # (tokens, >= V)
    R,  # (tokens, >= V)
    N,  # (tokens, >= V) or None
    WEIGHTS,  # (tokens,) or None
    OUT,  # (tokens, 5)
    STATISTICS,  # (tokens, 13)
    WORKSPACE,  # (tokens, splits, STATES) or None: the parts of split rows
    P_s, Q_s, R_s, N_s,
    V, tiles, splits,
    student_multiplier, student_cap, teacher_multiplier, teacher_cap,
    KIND: tl.constexpr, STUDENT_FORM: tl.constexpr, TEACHER_FORM: tl.constexpr,
    TAIL: tl.constexpr, LOADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = LOADS * LANES * VECTOR
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    active = True
    if WEIGHTS is not None:
        active = tl.load(WEIGHTS + row).to(tl.float32) != 0
    begin = part * tiles * TILE
    stop = tl.where(active, tl.minimum(begin + tiles * TILE, V), begin)  # a skipped row has no columns to read
    whole = begin + (stop - begin) // TILE * TILE
    P = _row(P, row, P_s, VECTOR)
    Q = _row(Q, row, Q_s, VECTOR)
    R = _row(R, row, R_s, VECTOR)
    if KIND != TEACHER_PRIOR:
        N = _row(N, row, N_s, VECTOR)

    low = tl.full([LANES], -INF, tl.float32)
    zero = tl.zeros([LANES], tl.float32)
    state = (
        low, zero, low, zero, low, zero, low, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, low, low, low,
        low,
    )  # fmt: skip
    for start in range(begin, whole, TILE):
        columns = _columns(start, LOADS, LANES, VECTOR)
        zp, zq, zr, zn = _read(
            P, Q, R, N, columns, True, student_multiplier, student_cap, teacher_multiplier, teacher_cap,
            KIND, STUDENT_FORM, TEACHER_FORM, False,
        )  # fmt: skip
        state = _grow(state, zp, zq, zr, zn, KIND)
    if whole < stop:  # the last, partial tile is the only one that pays for a mask
        columns = _columns(whole, LOADS, LANES, VECTOR)
        zp, zq, zr, zn = _read(
            P, Q, R, N, columns, _inside(columns, stop, TAIL), student_multiplier, student_cap, teacher_multiplier,
            teacher_cap, KIND, STUDENT_FORM, TEACHER_FORM, True,
        )  # fmt: skip
        state = _grow(state, zp, zq, zr, zn, KIND)

    state = _merge(state)
    if WORKSPACE is None:
        _finish(state, row, active, OUT, STATISTICS, KIND)
    else:
        line = WORKSPACE + (row * splits + part) * STATES
        for i in tl.static_range(STATES):
            tl.store(line + i, state[i])


@triton.jit(do_not_specialize=("WORKSPACE", "WEIGHTS", "OUT", "STATISTICS", "splits"))
def merge_kernel(
    WORKSPACE,  # (tokens, splits, STATES)
    WEIGHTS,  # (tokens,) or None
    OUT,  # (tokens, 5)
    STATISTICS,  # (tokens, 13)
    splits,
    KIND: tl.constexpr,
    PARTS: tl.constexpr,  # power of two >= splits
):
    """Second stage of split rows: one program merges one row's parts, in a fixed order."""
    row = tl.program_id(0).to(tl.int64)
    active = True
    if WEIGHTS is not None:
        active = tl.load(WEIGHTS + row).to(tl.float32) != 0
    part = tl.arange(0, PARTS)
    line = WORKSPACE + (row * splits + part) * STATES
    there = part < splits
    mp, sp = tl.load(line, there, -INF), tl.load(line + 1, there, 0.0)
    mq, sq = tl.load(line + 2, there, -INF), tl.load(line + 3, there, 0.0)
    mr, sr = tl.load(line + 4, there, -INF), tl.load(line + 5, there, 0.0)
    mn, sn = tl.load(line + 6, there, -INF), tl.load(line + 7, there, 0.0)
    state = _merge(
        (
            mp, sp, mq, sq, mr, sr, mn, sn,
            tl.load(line + 8, there, 0.0), tl.load(line + 9, there, 0.0), tl.load(line + 10, there, 0.0),
            tl.load(line + 11, there, 0.0), tl.load(line + 12, there, 0.0), tl.load(line + 13, there, 0.0),
            tl.load(line + 14, there, 0.0), tl.load(line + 15, there, 0.0), tl.load(line + 16, there, 0.0),
            tl.load(line + 17, there, -INF), tl.load(line + 18, there, -INF), tl.load(line + 19, there, -INF),
            tl.load(line + 20, there, -INF),
        )
    )  # fmt: skip
    _finish(state, row, active, OUT, STATISTICS, KIND)


# Gradient: a second look.


@triton.jit
def _coefficient(COEFFICIENTS, row, column: tl.constexpr, inverse_sum):
    """A coefficient over the sum that makes exp(z - maximum) a probability."""
    return tl.load(COEFFICIENTS + row * 5 + column).to(tl.float32) * inverse_sum


@triton.jit
def _any_coefficient(COEFFICIENTS, row):
    column = tl.arange(0, 8)
    w = tl.load(COEFFICIENTS + row * 5 + column, mask=column < 5, other=0.0)
    return tl.max((w != 0).to(tl.int32), 0) != 0


@triton.jit
def _look(X, columns, inside, needed, multiplier, cap, FORM: tl.constexpr, MASKED: tl.constexpr):
    """A tile of z, not read (and 0) unless `needed`; a mask that is the same everywhere keeps loads wide."""
    mask = needed
    if MASKED:
        mask = inside & needed
    return _transform(tl.load(X + columns, mask=mask, other=0.0), multiplier, cap, FORM)


@triton.jit
def _slope(z, multiplier, cap, FORM: tl.constexpr):
    """d z / d raw logit; z = cap * tanh(multiplier * x), both with the temperature in them."""
    slope = 1.0
    if FORM == SCALED:
        slope = multiplier
    elif FORM == SOFTCAPPED:
        slope = multiplier * cap - (multiplier / cap) * (z * z)  # in this form no architecture spills
    return slope


@triton.jit
def _write(X, columns, gradient, V, width, TAIL: tl.constexpr, MASKED: tl.constexpr):
    """Store a tile of a gradient, 0 past V."""
    if MASKED:
        gradient = tl.where(columns < V, gradient, 0.0)
        tl.store(X + columns, gradient.to(X.dtype.element_ty), mask=_inside(columns, width, TAIL))
    else:
        tl.store(X + columns, gradient.to(X.dtype.element_ty))


@triton.jit
def _row_gradient(
    P, Q, R, N, OUT_P, OUT_N, OUT_SECOND, columns, maxima, anchors, means, needs, used, w, second,
    V, OUT_P_w, OUT_N_w, OUT_SECOND_w, student_multiplier, student_cap, teacher_multiplier, teacher_cap, sums,
    KIND: tl.constexpr, STUDENT_FORM: tl.constexpr, TEACHER_FORM: tl.constexpr, WITH_GRAMIAN: tl.constexpr,
    TAIL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile: g = p * sum of w * (difference - its mean) * dz/dx. Returns the grown Gramian sums.

    p is exp(zp - max_p) here: 1 / sum is in the coefficients, and to be applied to the Gramian sums.
    """
    max_p, max_n = maxima
    c_pq, c_pr, c_pn, c_nr = anchors
    entropy, full, prior, shift, masked = means
    needs_p, needs_q, needs_r, needs_n = needs
    uses_full, uses_prior, uses_shift, uses_masked = used
    inside = True
    if MASKED:
        inside = _inside(columns, V, TAIL)
    zp = _look(P, columns, inside, needs_p, student_multiplier, student_cap, STUDENT_FORM, MASKED)
    zq = _look(Q, columns, inside, needs_q, teacher_multiplier, teacher_cap, TEACHER_FORM, MASKED)
    ap = zp - max_p
    p = _exp(ap)
    # The support is that of the distribution, within that of `_divergence`'s holes; the slope may be 0.
    support = p > SMALLEST
    p *= _slope(zp, student_multiplier, student_cap, STUDENT_FORM)
    if MASKED:
        support = support & inside
    support = support & needs_p

    # The selects keep 0 * inf away: a stream is read when any of its pairs is used, the others may be infinite.
    d_full = tl.where(uses_full, ap - (zq - c_pq) - full, 0.0)
    total = w[0] * (entropy - ap) + w[1] * d_full
    other = 0.0
    if OUT_SECOND is not None:
        other = second[0] * (entropy - ap) + second[1] * d_full
    d_vis, d_lang = d_full, 0.0
    if KIND != TEACHER_PRIOR:
        zn = _look(N, columns, inside, needs_n, student_multiplier, student_cap, STUDENT_FORM, MASKED)
    if (KIND != MATCHED) or (OUT_N is not None) or WITH_GRAMIAN:
        zr = _look(R, columns, inside, needs_r, teacher_multiplier, teacher_cap, TEACHER_FORM, MASKED)
    if KIND != MATCHED:
        d_prior = tl.where(uses_prior, ap - (zr - c_pr) - prior, 0.0)
        total += w[2] * d_prior
        if OUT_SECOND is not None:
            other += second[2] * d_prior
        d_vis -= d_prior
        d_lang = d_prior
    if KIND == BAYES:
        d_shift = tl.where(uses_shift, ap - (zn - c_pn) - shift, 0.0)
        total += w[3] * d_shift
        d_vis += d_shift
        if OUT_SECOND is not None:
            other += second[3] * d_shift

    lang, cross, vis = sums
    if WITH_GRAMIAN:
        g_vis = tl.where(support, p * d_vis, 0.0)
        vis += _sum(g_vis * g_vis)
        if KIND == TEACHER_PRIOR:
            g_lang = tl.where(support, p * d_lang, 0.0)
            lang += _sum(g_lang * g_lang)
            cross += _sum(g_lang * g_vis)
    if (KIND != TEACHER_PRIOR) and ((OUT_N is not None) or WITH_GRAMIAN):
        an = zn - max_n
        n = _exp(an)
        support_n = (n > SMALLEST) & needs_n
        n *= _slope(zn, student_multiplier, student_cap, STUDENT_FORM)
        if MASKED:
            support_n = support_n & inside
        g_masked = tl.where(support_n, n * tl.where(uses_masked, an - (zr - c_nr) - masked, 0.0), 0.0)
        if WITH_GRAMIAN:
            lang += _sum(g_masked * g_masked)
        if OUT_N is not None:
            _write(OUT_N, columns, g_masked * w[4], V, OUT_N_w, TAIL, MASKED)
    _write(OUT_P, columns, tl.where(support, p * total, 0.0), V, OUT_P_w, TAIL, MASKED)
    if OUT_SECOND is not None:
        _write(OUT_SECOND, columns, tl.where(support, p * other, 0.0), V, OUT_SECOND_w, TAIL, MASKED)
    return lang, cross, vis


GRADIENT_ARGUMENTS = (
    "P", "Q", "R", "N", "VALUES_", "STATISTICS", "COEFFICIENTS", "SECOND", "OUT_P", "OUT_N", "OUT_SECOND", "GRAMIAN",
    "P_s", "Q_s", "R_s", "N_s", "OUT_P_s", "OUT_N_s", "OUT_SECOND_s", "OUT_P_w", "OUT_N_w", "OUT_SECOND_w",
    "V", "width", "tiles", "splits", "student_multiplier", "student_cap", "teacher_multiplier", "teacher_cap",
)  # fmt: skip


@triton.jit(do_not_specialize=GRADIENT_ARGUMENTS)
def gradients_kernel(
    P,  # (tokens, >= V)
    Q,  # (tokens, >= V)
    R,  # (tokens, >= V)
    N,  # (tokens, >= V) or None
    VALUES_,  # (tokens, 5)
    STATISTICS,  # (tokens, 13)
    COEFFICIENTS,  # (tokens, 5)
    SECOND,  # (tokens, 5) or None
    OUT_P,  # (tokens, OUT_P_w)
    OUT_N,  # (tokens, OUT_N_w) or None
    OUT_SECOND,  # (tokens, OUT_SECOND_w) or None
    GRAMIAN,  # (tokens, splits, 3) or None
    P_s, Q_s, R_s, N_s, OUT_P_s, OUT_N_s, OUT_SECOND_s, OUT_P_w, OUT_N_w, OUT_SECOND_w,
    V, width, tiles, splits,
    student_multiplier, student_cap, teacher_multiplier, teacher_cap,
    KIND: tl.constexpr, STUDENT_FORM: tl.constexpr, TEACHER_FORM: tl.constexpr,
    TAIL: tl.constexpr, LOADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = LOADS * LANES * VECTOR
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    full = tl.load(VALUES_ + row * 5 + 1)
    prior = tl.load(VALUES_ + row * 5 + 2)
    shift = tl.load(VALUES_ + row * 5 + 3)
    masked = tl.load(VALUES_ + row * 5 + 4)
    inverse_p, inverse_n = tl.load(STATISTICS + row * 13 + 2), tl.load(STATISTICS + row * 13 + 3)
    w = (_coefficient(COEFFICIENTS, row, 0, inverse_p), _coefficient(COEFFICIENTS, row, 1, inverse_p),
         _coefficient(COEFFICIENTS, row, 2, inverse_p), _coefficient(COEFFICIENTS, row, 3, inverse_p),
         _coefficient(COEFFICIENTS, row, 4, inverse_n))  # fmt: skip
    second = w
    active = _any_coefficient(COEFFICIENTS, row)
    if SECOND is not None:
        second = (_coefficient(SECOND, row, 0, inverse_p), _coefficient(SECOND, row, 1, inverse_p),
                  _coefficient(SECOND, row, 2, inverse_p), _coefficient(SECOND, row, 3, inverse_p),
                  0.0)  # fmt: skip
        active = active | _any_coefficient(SECOND, row)

    # A pair is used when a coefficient asks for it, or the Gramian, unless its value is infinite: no direction.
    measured = active & (GRAMIAN is not None)
    uses_full = ((w[1] != 0) | (second[1] != 0) | measured) & (tl.abs(full) != INF)
    uses_prior = ((w[2] != 0) | (second[2] != 0) | measured) & (tl.abs(prior) != INF)
    uses_shift = ((w[3] != 0) | (second[3] != 0) | measured) & (tl.abs(shift) != INF)
    uses_masked = ((w[4] != 0) | measured) & (tl.abs(masked) != INF)
    if KIND == MATCHED:
        uses_prior = uses_prior & False
    if KIND != BAYES:
        uses_shift = uses_shift & False
    if KIND == TEACHER_PRIOR:
        uses_masked = uses_masked & False
    needs_p = (w[0] != 0) | (second[0] != 0) | uses_full | uses_prior | uses_shift
    needs = (needs_p, uses_full, uses_prior | uses_masked, uses_shift | uses_masked)
    used = (uses_full, uses_prior, uses_shift, uses_masked)
    line = STATISTICS + row * 13
    maxima = (tl.load(line), tl.load(line + 1))
    anchors = (tl.load(line + 4), tl.load(line + 5), tl.load(line + 6), tl.load(line + 7))
    means = (tl.load(line + 8), tl.load(line + 9), tl.load(line + 10), tl.load(line + 11), tl.load(line + 12))

    P = _row(P, row, P_s, VECTOR)
    Q = _row(Q, row, Q_s, VECTOR)
    R = _row(R, row, R_s, VECTOR)
    OUT_P = _row(OUT_P, row, OUT_P_s, VECTOR)
    if KIND != TEACHER_PRIOR:
        N = _row(N, row, N_s, VECTOR)
    if OUT_N is not None:
        OUT_N = _row(OUT_N, row, OUT_N_s, VECTOR)
    if OUT_SECOND is not None:
        OUT_SECOND = _row(OUT_SECOND, row, OUT_SECOND_s, VECTOR)

    begin = part * tiles * TILE
    stop = tl.minimum(begin + tiles * TILE, width)
    whole = begin + tl.maximum(tl.minimum(stop, V) - begin, 0) // TILE * TILE
    zero = tl.zeros([LANES], tl.float32)
    sums = (zero, zero, zero)
    for start in range(begin, whole, TILE):
        sums = _row_gradient(
            P, Q, R, N, OUT_P, OUT_N, OUT_SECOND, _columns(start, LOADS, LANES, VECTOR), maxima, anchors, means, needs,
            used, w, second, V, OUT_P_w, OUT_N_w, OUT_SECOND_w, student_multiplier, student_cap, teacher_multiplier,
            teacher_cap,
            sums, KIND, STUDENT_FORM, TEACHER_FORM, GRAMIAN is not None, TAIL, False,
        )  # fmt: skip
    for start in range(whole, stop, TILE):  # the tile that V cuts, and those that are padding only
        sums = _row_gradient(
            P, Q, R, N, OUT_P, OUT_N, OUT_SECOND, _columns(start, LOADS, LANES, VECTOR), maxima, anchors, means, needs,
            used, w, second, V, OUT_P_w, OUT_N_w, OUT_SECOND_w, student_multiplier, student_cap, teacher_multiplier,
            teacher_cap,
            sums, KIND, STUDENT_FORM, TEACHER_FORM, GRAMIAN is not None, TAIL, True,
        )  # fmt: skip
    if GRAMIAN is not None:
        line = GRAMIAN + (row * splits + part) * 3
        inverse_lang = inverse_p if KIND == TEACHER_PRIOR else inverse_n
        tl.store(line, tl.sum(sums[0], 0) * inverse_lang * inverse_lang)
        tl.store(line + 1, tl.sum(sums[1], 0) * inverse_p * inverse_p)
        tl.store(line + 2, tl.sum(sums[2], 0) * inverse_p * inverse_p)


# Launchers.


def _form(scale: float, softcap: float, temperature: float) -> tuple[int, float, float]:
    """(form, multiplier, cap) of `_transform`; work that would change nothing is left out when compiling."""
    if softcap:
        return SOFTCAP_FORM, scale / softcap, softcap / temperature
    multiplier = scale / temperature
    return (PLAIN_FORM if multiplier == 1.0 else SCALED_FORM), multiplier, 0.0


def _settings(transform: LogitTransform) -> tuple[tuple[float, float, float, float], dict[str, int]]:
    """The kernels' trailing scalars and the constants that depend on the transform."""
    student_form, student_multiplier, student_cap = _form(
        transform.student_scale, transform.student_softcap, transform.temperature
    )
    teacher_form, teacher_multiplier, teacher_cap = _form(
        transform.teacher_scale, transform.teacher_softcap, transform.temperature
    )
    constants = {
        "KIND": DECOMPOSITION_CODES[transform.decomposition],
        "STUDENT_FORM": student_form,
        "TEACHER_FORM": teacher_form,
    }
    return (student_multiplier, student_cap, teacher_multiplier, teacher_cap), constants


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _check(logits: tuple[Tensor | None, ...]) -> None:
    for tensor in logits:
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(
                f"the Triton kernels take float32, bfloat16 and float16 logits, not {tensor.dtype}; "
                'use backend="reference" for it'
            )
        if tensor is not None and tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(f"logits need unit stride along the vocabulary, got strides {tensor.stride()}")


def _aligned(tensors: tuple[Tensor | None, ...], vector: int) -> bool:
    """Whether every row of every tensor starts at a multiple of `vector` elements, or of a full-width load."""
    for tensor in tensors:
        if tensor is not None:
            size = tensor.element_size()
            needed = min(vector * size, config.LOAD_BYTES)
            if tensor.data_ptr() % needed or tensor.stride(0) * size % needed:
                return False
    return True


def _tile(shape: config.Geometry, *columns: int) -> dict[str, int]:
    """The constants of a tile. TAIL keeps loads wide where rows end, when all rows end at whole vectors."""
    even = all(count % shape.vector == 0 for count in columns)
    return {
        "TAIL": shape.vector if even else 1, "LOADS": shape.loads, "LANES": shape.lanes, "VECTOR": shape.vector,
    }  # fmt: skip


_tuned_warps: dict[tuple[Any, ...], int] = {}


def _warps(launch: Callable[[int], None], key: tuple[Any, ...], device: torch.device) -> int | None:
    """The measured best number of warps when autotuning is asked for, else None. Never while a graph is captured."""
    if device.type == "cpu" or not config.autotune_requested() or torch.cuda.is_current_stream_capturing():
        return None
    if key not in _tuned_warps:
        from triton.testing import do_bench  # imports much that nothing else here needs

        timings = {warps: do_bench(lambda w=warps: launch(w)) for warps in config.CANDIDATE_WARPS}
        _tuned_warps[key] = min(timings, key=lambda warps: timings[warps])
    return _tuned_warps[key]


def divergences(
    student: Tensor,  # (tokens, >= vocab)
    teacher: Tensor,  # (tokens, >= vocab)
    masked_teacher: Tensor,  # (tokens, >= vocab)
    masked_student: Tensor | None,  # (tokens, >= vocab)
    transform: LogitTransform,
    token_weights: Tensor | None = None,  # (tokens,): rows of weight 0 are not read, their results are 0
) -> tuple[Tensor, Tensor]:
    """`divergences` of `decomposed_kl/reference.py`: values (tokens, 5) and statistics (tokens, 13), float32.

    Raises:
        ValueError: float64 logits, or logits without unit stride along the vocabulary.
    """
    streams = (student, teacher, masked_teacher, masked_student)
    _check(streams)
    tokens, vocab = student.shape[0], transform.vocab_size
    values = student.new_empty((tokens, VALUES), dtype=torch.float32)
    statistics = student.new_empty((tokens, STATISTICS), dtype=torch.float32)
    if tokens == 0:
        return values, statistics
    if token_weights is not None:
        token_weights = token_weights.contiguous()
    scalars, constants = _settings(transform)
    device = config.describe_device(student.device)
    vector = config.LOAD_BYTES // student.element_size()

    def launch(warps: int | None) -> None:
        shape = config.geometry(device, student.element_size(), warps, aligned=_aligned(streams, vector))
        splits, tiles = config.split_row(device, shape, tokens, vocab)
        options = config.forward_options(device, shape, transform.decomposition)
        workspace = None
        if splits > 1:
            workspace = values.new_empty((tokens, splits, WORKSPACE_STATES))
        divergences_kernel[(tokens, splits)](
            *streams, token_weights, values, statistics, workspace, *map(_stride, streams), vocab, tiles, splits,
            *scalars, **constants, **_tile(shape, vocab), **options,
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(tokens,)](
                workspace, token_weights, values, statistics, splits,
                KIND=constants["KIND"], PARTS=triton.next_power_of_2(splits), num_warps=1,
            )  # fmt: skip

    with torch.cuda.device_of(student):
        launch(_warps(launch, ("divergences", tokens, vocab, student.dtype, *constants.values()), student.device))
    return values, statistics


def logit_gradients(
    student: Tensor,  # (tokens, >= vocab)
    teacher: Tensor,  # (tokens, >= vocab)
    masked_teacher: Tensor,  # (tokens, >= vocab)
    masked_student: Tensor | None,  # (tokens, >= vocab)
    values: Tensor,  # (tokens, 5), of `divergences`
    statistics: Tensor,  # (tokens, 13), of `divergences`
    coefficients: Tensor,  # (tokens, 5): d objective / d values
    transform: LogitTransform,
    *,
    out_student: Tensor,  # (tokens, >= vocab)
    out_masked_student: Tensor | None = None,  # (tokens, >= vocab)
    second_coefficients: Tensor | None = None,  # (tokens, 5): of a second objective of the student's logits
    out_second: Tensor | None = None,  # (tokens, >= vocab)
    row_gramian: Tensor | None = None,  # (tokens, 3)
    column_squares: Tensor | None = None,  # (outputs, vocab), float32
) -> None:
    """`logit_gradients` of `decomposed_kl/reference.py`: writes the outputs, each of which may be an input.

    Raises:
        ValueError: float64 logits or outputs, or tensors without unit stride along the vocabulary.
    """
    streams = (student, teacher, masked_teacher, masked_student)
    outputs = (out_student, out_masked_student, out_second)
    _check((*streams, *outputs))
    tokens, vocab = student.shape[0], transform.vocab_size
    if tokens == 0:
        if column_squares is not None:
            column_squares.zero_()
        return
    if second_coefficients is not None:
        second_coefficients = second_coefficients.contiguous()
    rows = (values.contiguous(), statistics.contiguous(), coefficients.contiguous(), second_coefficients)
    scalars, constants = _settings(transform)
    device = config.describe_device(student.device)
    vector = config.LOAD_BYTES // student.element_size()
    output_widths = tuple(0 if out is None else out.shape[1] for out in outputs)
    width = max(output_widths)

    def launch(warps: int | None, outputs: tuple[Tensor | None, ...] = outputs) -> None:
        aligned = _aligned((*streams, *outputs), vector)
        shape = config.geometry(device, student.element_size(), warps, aligned=aligned)
        splits, tiles = config.split_row(device, shape, tokens, width)
        parts = None
        if row_gramian is not None:
            parts = values.new_empty((tokens, splits, 3), dtype=torch.float32)
        columns = (vocab, *(out.shape[1] for out in outputs if out is not None))
        gradients_kernel[(tokens, splits)](
            *streams, *rows, *outputs, parts, *map(_stride, (*streams, *outputs)), *output_widths, vocab, width, tiles,
            splits, *scalars, **constants, **_tile(shape, *columns), num_warps=shape.warps,
        )  # fmt: skip
        if row_gramian is not None and parts is not None:
            row_gramian.copy_(parts.sum(1))  # the second stage of split rows

    def trial(warps: int) -> None:
        # Timing repeats the launch: into scratch, because outputs may be inputs.
        launch(warps, tuple(None if out is None else torch.empty_like(out) for out in outputs))

    with torch.cuda.device_of(student):
        key = ("gradients", tokens, width, vocab, student.dtype, out_student.dtype, out_second is None,
               row_gramian is None, *constants.values())  # fmt: skip
        launch(_warps(trial, key, student.device))
    if column_squares is not None:
        # Read once more: a program has a part of a row, and columns would need atomics, whose order varies.
        written = [out[:, :vocab] for out in outputs if out is not None]
        for squares, out in zip(column_squares, written, strict=True):
            squares.copy_(torch.linalg.vector_norm(out, dim=0, dtype=torch.float32).square_())

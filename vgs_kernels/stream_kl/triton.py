"""Triton backend of `stream_kl`, for CUDA and ROCm: the two functions of `stream_kl/reference.py`.

`divergences` reads every stream once (twice with a guard). `logit_gradients` is a second look, in place where the
caller wants it. fp32, bf16 and fp16 logits, fp32 inside; fp64 belongs to the reference backend.

Legend, inside kernels:
    p q r n         streams: student, teacher, masked teacher, masked student ("n": no image); t: what THIRD compares p
                    with, r or the visual target q*
    P Q R N         their pointers; suffix _s: row stride in elements, _w: width of an output
    z               transformed logits, softcap(scale * x) / temperature
    m s             running maximum of z, running sum of exp(z - m)
    zp zq ...       z of a stream; ap = zp - mp; ep = exp(ap)
    c_q c_r c_n     anchors: z of a stream where p has its maximum, 0 where that is not finite
    uq ur un ut     z - anchor; ut = uq + (un - ur) for the visual target; mt is relative to the anchors as well
    self            sum of ep * ap
    pq pt nr qr     a pair of streams: the sum of ep * (ap - uq), ep * (ap - ut), en * (un - ur), eq * (uq - ur)
    h_pq ...        hole: largest z of the first stream where the second is -inf; mass there makes the pair infinite
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
from .reference import STATISTICS, VALUES, Streams
from .transform import LogitTransform

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = {"reverse_kl": 0, "prior": 1, "visual": 2}  # two, three and four streams
PLAIN_FORM, SCALED_FORM, SOFTCAP_FORM = range(3)  # what lies between a raw logit and z

# Python numbers are visible to kernels only as constexpr.
REVERSE_KL = tl.constexpr(KINDS["reverse_kl"])
VISUAL = tl.constexpr(KINDS["visual"])
SCALED = tl.constexpr(SCALED_FORM)
SOFTCAPPED = tl.constexpr(SOFTCAP_FORM)
LOG2E = tl.constexpr(math.log2(math.e))  # exp(x) = exp2(x * LOG2E): GPUs have exp2 in hardware
LN2 = tl.constexpr(math.log(2.0))
INF = tl.constexpr(math.inf)
SMALLEST = tl.constexpr(2.0**-126)  # normal float32 number: what lies below is no mass
WORKSPACE_STATES = 22  # numbers that describe a part of a row, the tuple `state`
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
def _anchor(a, z, c, raised):
    """A stream's anchor after a tile: its z where p has its maximum, where the tile raised that."""
    there = _max(tl.where(a == 0, z, -INF))
    return tl.where(raised, tl.where(tl.abs(there) == INF, 0.0, there), c)


@triton.jit
def _hole(hole, a, m, there):
    """The hole after a tile, of the first stream's distances and maximum, and of where the second has mass. Found as
    a + m, not from the first stream's z: keeping that tile alive as well costs registers."""
    return tl.maximum(hole, _max(tl.where(there, -INF, a)) + m)


@triton.jit
def _weighted(e, d, there):
    return _sum(tl.where((e > 0) & there, e * d, 0.0))


@triton.jit
def _ratio(ur, un, zq, guard, GUARDED: tl.constexpr):
    """log p0 - log r up to a constant, of the distances from the anchors; with a guard without one, clamped and cut."""
    ratio = un - ur
    offset, bound, floor = guard
    if GUARDED:
        ratio -= offset
    ratio = tl.where(un == -INF, -INF, ratio)  # no mass in p0: none in q*, whatever r has there
    if GUARDED:
        ratio = tl.minimum(tl.maximum(ratio, -bound, tl.PropagateNan.ALL), bound, tl.PropagateNan.ALL)
        ratio = tl.where(zq >= floor, ratio, 0.0)
    return ratio


@triton.jit
def _grow(state, zp, zq, zr, zn, fixed, guard, KIND: tl.constexpr, GUARDED: tl.constexpr):
    """The state after one more tile. `fixed`: anchors of r and n that the guard's offset goes with."""
    mp, sp, mq, sq, mr, sr, mn, sn, mt, st, self, pq, pt, nr, qr, c_q, c_r, c_n, h_pq, h_pt, h_nr, h_qr = state
    ap, ep, mp, sp_new, fp, dp = _stream(zp, mp, sp)
    self = _moved(self, sp, fp, dp) + _sum(tl.where(ep > 0, ep * ap, 0.0))
    raised = (dp != 0) | (fp == 0)  # the first finite entry shifts by 0

    new_q = _anchor(ap, zq, c_q, raised)
    uq = zq - new_q[None, :, None]
    step_q = new_q - c_q
    there_q = zq != -INF
    pq = _moved(pq, sp, fp, dp - step_q) + _weighted(ep, ap - uq, there_q)
    h_pq = _hole(h_pq, ap, mp, there_q)
    aq, eq, mq, sq_new, fq, _dq = _stream(zq, mq, sq)
    if KIND != REVERSE_KL:
        new_r = _anchor(ap, zr, c_r, raised)
        ur = zr - new_r[None, :, None]
        step_r = new_r - c_r
        there_r = zr != -INF
        _ar, _er, mr, sr, _fr, _dr = _stream(zr, mr, sr)
        if KIND != VISUAL:
            pt = _moved(pt, sp, fp, dp - step_r) + _weighted(ep, ap - ur, there_r)
            h_pt = _hole(h_pt, ap, mp, there_r)
        else:
            new_n = _anchor(ap, zn, c_n, raised)
            un = zn - new_n[None, :, None]
            step_n = new_n - c_n
            _an, en, mn, sn_new, fn, _dn = _stream(zn, mn, sn)
            nr = _moved(nr, sn, fn, step_n - step_r) + _weighted(en, un - ur, there_r)
            h_nr = _hole(h_nr, _an, mn, there_r)
            qr = _moved(qr, sq, fq, step_q - step_r) + _weighted(eq, uq - ur, there_r)
            h_qr = _hole(h_qr, aq, mq, there_r)
            sn = sn_new
            if GUARDED:
                fixed_r, fixed_n = fixed
                ratio = _ratio(zr - fixed_r, zn - fixed_n, zq, guard, GUARDED)
                step_t = step_q
            else:
                ratio = _ratio(ur, un, zq, guard, GUARDED)
                step_t = step_q + (step_n - step_r)
            ut = tl.where(there_q, uq + ratio, -INF)
            improper = ut == INF  # no distribution: the hole is infinite whatever mass p has there
            there_t = tl.abs(ut) != INF
            pt = _moved(pt, sp, fp, dp - step_t) + _weighted(ep, ap - ut, there_t)
            h_pt = tl.maximum(_hole(h_pt, ap, mp, there_t), _max(tl.where(improper, INF, -INF)))
            mt = tl.where(mt == -INF, -INF, mt - step_t)
            _at, _et, mt, st, _ft, _dt = _stream(tl.where(improper, -INF, ut), mt, st)
            c_n = new_n
        c_r = new_r
    return (
        mp, sp_new, mq, sq_new, mr, sr, mn, sn, mt, st, self, pq, pt, nr, qr, new_q, c_r, c_n, h_pq, h_pt, h_nr, h_qr,
    )  # fmt: skip


@triton.jit
def _gather(m, s):
    """Merge one stream over all parts."""
    top = tl.max(m, 0)
    _anchor, factor, shift = _rise(m, top)
    return top, tl.sum(s * factor, 0), factor, shift


@triton.jit
def _gather_anchor(c, m, top):
    """That of a part which holds p's maximum."""
    return tl.max(tl.where(m == top, c, -INF), 0)


@triton.jit
def _merge(state, KIND: tl.constexpr, GUARDED: tl.constexpr):
    """One state, of scalars, from a vector of states of disjoint parts."""
    mp, sp, mq, sq, mr, sr, mn, sn, mt, st, self, pq, pt, nr, qr, c_q, c_r, c_n, h_pq, h_pt, h_nr, h_qr = state
    top_p, sp_all, fp, dp = _gather(mp, sp)
    mq, sq_all, fq, _dq = _gather(mq, sq)
    mr, sr, _fr, _dr = _gather(mr, sr)
    mn, sn_all, fn, _dn = _gather(mn, sn)
    new_q, new_r, new_n = _gather_anchor(c_q, mp, top_p), _gather_anchor(c_r, mp, top_p), _gather_anchor(c_n, mp, top_p)
    step_q, step_r, step_n = new_q - c_q, new_r - c_r, new_n - c_n
    step_t = step_r
    if KIND == VISUAL:
        step_t = step_q
        if not GUARDED:
            step_t = step_q + (step_n - step_r)
        mt, st, _ft, _dt = _gather(tl.where(mt == -INF, -INF, mt - step_t), st)
    else:
        mt, st = tl.max(mt, 0), tl.sum(st, 0)
    self = tl.sum(_moved(self, sp, fp, dp), 0)
    pq = tl.sum(_moved(pq, sp, fp, dp - step_q), 0)
    pt = tl.sum(_moved(pt, sp, fp, dp - step_t), 0)
    nr = tl.sum(_moved(nr, sn, fn, step_n - step_r), 0)
    qr = tl.sum(_moved(qr, sq, fq, step_q - step_r), 0)
    h_pq, h_pt, h_nr, h_qr = tl.max(h_pq, 0), tl.max(h_pt, 0), tl.max(h_nr, 0), tl.max(h_qr, 0)
    return (
        top_p, sp_all, mq, sq_all, mr, sr, mn, sn_all, mt, st, self, pq, pt, nr, qr, new_q, new_r, new_n,
        h_pq, h_pt, h_nr, h_qr,
    )  # fmt: skip


@triton.jit
def _log(x):
    return tl.log2(x) * LN2


@triton.jit
def _divergence(mean, s_from, s_to, m_to, hole, normalizer):
    """KL from a finished pair, m_to relative to where the mean's distances begin; +inf where the first distribution has
    mass that the second lacks."""
    kl = mean + _log(s_to / s_from) + m_to  # one logarithm of the ratio: two would cancel
    kl = tl.where(_exp(hole - normalizer) >= SMALLEST, INF, kl)
    return tl.where(s_from == 0, 0.0, kl)  # no mass at all: nothing to sum


@triton.jit
def _finish(state, row, active, OUT, STATISTICS, KIND: tl.constexpr):
    """Write the row's values and statistics, 0 for a skipped row."""
    mp, sp, mq, sq, mr, sr, mn, sn, mt, st, self, pq, pt, nr, qr, c_q, c_r, c_n, h_pq, h_pt, h_nr, h_qr = state
    inverse_p = tl.where(active & (sp != 0), 1.0 / sp, 0.0)
    norm_p = mp + _log(sp)
    mq -= c_q  # from here on relative to the anchors
    lse_q, lse_r, lse_n, top_r = mq + _log(sq), 0.0, 0.0, 0.0
    standard = _divergence(pq * inverse_p, sp, sq, mq, h_pq, norm_p)
    third, language, dependency = 0.0, 0.0, 0.0
    if KIND != REVERSE_KL:
        mr -= c_r
        lse_r, top_r = mr + _log(sr), mr
        if KIND != VISUAL:
            third = _divergence(pt * inverse_p, sp, sr, mr, h_pt, norm_p)
        else:
            mn -= c_n
            lse_n = mn + _log(sn)
            third = _divergence(pt * inverse_p, sp, st, mt, h_pt, norm_p)
            language = _divergence(nr / sn, sn, sr, mr - mn, h_nr - c_n, lse_n)
            dependency = _divergence(qr / sq, sq, sr, mr - mq, h_qr - c_q, lse_q)
    entropy = tl.where(sp == 0, 0.0, _log(sp) - self * inverse_p)
    line = OUT + row * 5
    tl.store(line, tl.where(active, entropy, 0.0))
    tl.store(line + 1, tl.where(active, standard, 0.0))
    tl.store(line + 2, tl.where(active, third, 0.0))
    tl.store(line + 3, tl.where(active, language, 0.0))
    tl.store(line + 4, tl.where(active, dependency, 0.0))
    line = STATISTICS + row * 13
    tl.store(line, tl.where(active & (mp != -INF), mp, 0.0))
    tl.store(line + 1, inverse_p)
    tl.store(line + 2, tl.where(active, c_q, 0.0))
    tl.store(line + 3, tl.where(active, c_r, 0.0))
    tl.store(line + 4, tl.where(active, c_n, 0.0))
    tl.store(line + 5, self * inverse_p)
    tl.store(line + 6, pq * inverse_p)
    tl.store(line + 7, pt * inverse_p)
    tl.store(line + 8, tl.where(active, lse_q, 0.0))
    tl.store(line + 9, tl.where(active, lse_r, 0.0))
    tl.store(line + 10, tl.where(active, lse_n, 0.0))
    tl.store(line + 11, tl.where(active, mq, 0.0))
    tl.store(line + 12, tl.where(active, top_r, 0.0))


@triton.jit
def _guard(STATISTICS, row, bound, log_floor, GUARDED: tl.constexpr):
    """(offset, bound, floor) of `_ratio`, and the anchors of r and n that the offset goes with."""
    guard, fixed = (0.0, 0.0, 0.0), (0.0, 0.0)
    if GUARDED:
        line = STATISTICS + row * 13
        offset = tl.load(line + 10) - tl.load(line + 9)
        offset = tl.where(tl.abs(offset) == INF, 0.0, offset)  # a stream without mass has -inf everywhere anyway
        guard = (offset, bound, tl.load(line + 2) + (tl.load(line + 11) + log_floor))
        fixed = (tl.load(line + 3), tl.load(line + 4))
    return guard, fixed


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
    zr, zn = zq, zp
    if KIND != REVERSE_KL:
        zr = _load(R, columns, inside, teacher_multiplier, teacher_cap, TEACHER_FORM, MASKED)
    if KIND == VISUAL:
        zn = _load(N, columns, inside, student_multiplier, student_cap, STUDENT_FORM, MASKED)
    return zp, zq, zr, zn


FORWARD_ARGUMENTS = (
    "P", "Q", "R", "N", "WEIGHTS", "OUT", "STATISTICS", "WORKSPACE", "P_s", "Q_s", "R_s", "N_s", "V", "tiles",
    "splits", "student_multiplier", "student_cap", "teacher_multiplier", "teacher_cap", "bound", "log_floor",
)  # fmt: skip


# Nothing is specialised on argument values: what the code depends on is in the constants, so that the compiled variants
# are the ones the compile gate checks, and a new stride or vocabulary does not compile anew.
@triton.jit(do_not_specialize=FORWARD_ARGUMENTS)
def divergences_kernel(
    P,  # (tokens, >= V)
    Q,  # (tokens, >= V)
    R,  # (tokens, >= V) or None
    N,  # (tokens, >= V) or None
    WEIGHTS,  # (tokens,) or None
    OUT,  # (tokens, 5)
    STATISTICS,  # (tokens, 13); with a guard they are those of a launch without
    WORKSPACE,  # (tokens, splits, STATES) or None: the parts of split rows
    P_s, Q_s, R_s, N_s,
    V, tiles, splits,
    student_multiplier, student_cap, teacher_multiplier, teacher_cap, bound, log_floor,
    KIND: tl.constexpr, GUARDED: tl.constexpr, STUDENT_FORM: tl.constexpr, TEACHER_FORM: tl.constexpr,
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
    if KIND != REVERSE_KL:
        R = _row(R, row, R_s, VECTOR)
    if KIND == VISUAL:
        N = _row(N, row, N_s, VECTOR)
    guard, fixed = _guard(STATISTICS, row, bound, log_floor, GUARDED)

    low = tl.full([LANES], -INF, tl.float32)
    zero = tl.zeros([LANES], tl.float32)
    state = (
        low, zero, low, zero, low, zero, low, zero, low, zero, zero, zero, zero, zero, zero, zero, zero, zero, low, low,
        low, low,
    )  # fmt: skip
    for start in range(begin, whole, TILE):
        columns = _columns(start, LOADS, LANES, VECTOR)
        zp, zq, zr, zn = _read(
            P, Q, R, N, columns, True, student_multiplier, student_cap, teacher_multiplier, teacher_cap,
            KIND, STUDENT_FORM, TEACHER_FORM, False,
        )  # fmt: skip
        state = _grow(state, zp, zq, zr, zn, fixed, guard, KIND, GUARDED)
    if whole < stop:  # the last, partial tile is the only one that pays for a mask
        columns = _columns(whole, LOADS, LANES, VECTOR)
        zp, zq, zr, zn = _read(
            P, Q, R, N, columns, _inside(columns, stop, TAIL), student_multiplier, student_cap, teacher_multiplier,
            teacher_cap, KIND, STUDENT_FORM, TEACHER_FORM, True,
        )  # fmt: skip
        state = _grow(state, zp, zq, zr, zn, fixed, guard, KIND, GUARDED)

    state = _merge(state, KIND, GUARDED)
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
    GUARDED: tl.constexpr,
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
    state = (
        tl.load(line, there, -INF), tl.load(line + 1, there, 0.0), tl.load(line + 2, there, -INF),
        tl.load(line + 3, there, 0.0), tl.load(line + 4, there, -INF), tl.load(line + 5, there, 0.0),
        tl.load(line + 6, there, -INF), tl.load(line + 7, there, 0.0), tl.load(line + 8, there, -INF),
        tl.load(line + 9, there, 0.0), tl.load(line + 10, there, 0.0), tl.load(line + 11, there, 0.0),
        tl.load(line + 12, there, 0.0), tl.load(line + 13, there, 0.0), tl.load(line + 14, there, 0.0),
        tl.load(line + 15, there, 0.0), tl.load(line + 16, there, 0.0), tl.load(line + 17, there, 0.0),
        tl.load(line + 18, there, -INF), tl.load(line + 19, there, -INF), tl.load(line + 20, there, -INF),
        tl.load(line + 21, there, -INF),
    )  # fmt: skip
    _finish(_merge(state, KIND, GUARDED), row, active, OUT, STATISTICS, KIND)


# Gradient: a second look.


@triton.jit
def _coefficient(COEFFICIENTS, row, column: tl.constexpr, inverse_sum):
    """A coefficient over the sum that makes exp(z - maximum) a probability."""
    return tl.load(COEFFICIENTS + row * 3 + column).to(tl.float32) * inverse_sum


@triton.jit
def _any_coefficient(COEFFICIENTS, row):
    column = tl.arange(0, 4)
    w = tl.load(COEFFICIENTS + row * 3 + column, mask=column < 3, other=0.0)
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
    P, Q, R, N, OUT, OUT_SECOND, columns, maximum, inverse_sum, anchors, means, needs, used, w, second, guard,
    V, OUT_w, OUT_SECOND_w, student_multiplier, student_cap, teacher_multiplier, teacher_cap,
    KIND: tl.constexpr, GUARDED: tl.constexpr, STUDENT_FORM: tl.constexpr, TEACHER_FORM: tl.constexpr,
    TAIL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile: g = p * sum of w * (difference - its mean) * dz/dx.

    p is exp(zp - maximum) here: 1 / sum is in the coefficients.
    """
    c_q, c_r, c_n = anchors
    mean_entropy, mean_standard, mean_third = means
    needs_p, needs_q, needs_rest = needs
    uses_standard, uses_third = used
    inside = True
    if MASKED:
        inside = _inside(columns, V, TAIL)
    zp = _look(P, columns, inside, needs_p, student_multiplier, student_cap, STUDENT_FORM, MASKED)
    zq = _look(Q, columns, inside, needs_q, teacher_multiplier, teacher_cap, TEACHER_FORM, MASKED)
    ap = zp - maximum
    p = _exp(ap)
    support = p * inverse_sum >= SMALLEST
    p *= _slope(zp, student_multiplier, student_cap, STUDENT_FORM)
    if MASKED:
        support = support & inside
    support = support & needs_p

    # The selects keep 0 * inf away: a stream is read when any of its pairs is used, the others may be infinite.
    uq = zq - c_q
    d_standard = tl.where(uses_standard, ap - uq - mean_standard, 0.0)
    total = w[0] * (mean_entropy - ap) + w[1] * d_standard
    other = 0.0
    if OUT_SECOND is not None:
        other = second[0] * (mean_entropy - ap) + second[1] * d_standard
    if KIND != REVERSE_KL:
        ut = _look(R, columns, inside, needs_rest, teacher_multiplier, teacher_cap, TEACHER_FORM, MASKED) - c_r
        if KIND == VISUAL:
            un = _look(N, columns, inside, needs_rest, student_multiplier, student_cap, STUDENT_FORM, MASKED) - c_n
            ut = uq + _ratio(ut, un, zq, guard, GUARDED)
        d_third = tl.where(uses_third, ap - ut - mean_third, 0.0)
        total += w[2] * d_third
        if OUT_SECOND is not None:
            other += second[2] * d_third
    _write(OUT, columns, tl.where(support, p * total, 0.0), V, OUT_w, TAIL, MASKED)
    if OUT_SECOND is not None:
        _write(OUT_SECOND, columns, tl.where(support, p * other, 0.0), V, OUT_SECOND_w, TAIL, MASKED)


GRADIENT_ARGUMENTS = (
    "P", "Q", "R", "N", "VALUES_", "STATISTICS", "COEFFICIENTS", "SECOND", "OUT", "OUT_SECOND", "P_s", "Q_s", "R_s",
    "N_s", "OUT_s", "OUT_SECOND_s", "OUT_w", "OUT_SECOND_w", "V", "width", "tiles", "student_multiplier",
    "student_cap", "teacher_multiplier", "teacher_cap", "bound", "log_floor",
)  # fmt: skip


@triton.jit(do_not_specialize=GRADIENT_ARGUMENTS)
def gradients_kernel(
    P,  # (tokens, >= V)
    Q,  # (tokens, >= V)
    R,  # (tokens, >= V) or None
    N,  # (tokens, >= V) or None
    VALUES_,  # (tokens, 5)
    STATISTICS,  # (tokens, 13)
    COEFFICIENTS,  # (tokens, 3)
    SECOND,  # (tokens, 3) or None
    OUT,  # (tokens, OUT_w)
    OUT_SECOND,  # (tokens, OUT_SECOND_w) or None
    P_s, Q_s, R_s, N_s, OUT_s, OUT_SECOND_s, OUT_w, OUT_SECOND_w,
    V, width, tiles,
    student_multiplier, student_cap, teacher_multiplier, teacher_cap, bound, log_floor,
    KIND: tl.constexpr, GUARDED: tl.constexpr, STUDENT_FORM: tl.constexpr, TEACHER_FORM: tl.constexpr,
    TAIL: tl.constexpr, LOADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = LOADS * LANES * VECTOR
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    line = STATISTICS + row * 13
    maximum, inverse_sum = tl.load(line), tl.load(line + 1)
    w = (_coefficient(COEFFICIENTS, row, 0, inverse_sum), _coefficient(COEFFICIENTS, row, 1, inverse_sum),
         _coefficient(COEFFICIENTS, row, 2, inverse_sum))  # fmt: skip
    second = w
    if SECOND is not None:
        second = (_coefficient(SECOND, row, 0, inverse_sum), _coefficient(SECOND, row, 1, inverse_sum),
                  _coefficient(SECOND, row, 2, inverse_sum))  # fmt: skip
    # A number is used when a coefficient asks for it, unless its value is infinite: no direction.
    uses_standard = ((w[1] != 0) | (second[1] != 0)) & (tl.abs(tl.load(VALUES_ + row * 5 + 1)) != INF)
    uses_third = ((w[2] != 0) | (second[2] != 0)) & (tl.abs(tl.load(VALUES_ + row * 5 + 2)) != INF)
    if KIND == REVERSE_KL:
        uses_third = uses_third & False
    needs_q = uses_standard
    if KIND == VISUAL:
        needs_q = uses_standard | uses_third
    needs = ((w[0] != 0) | (second[0] != 0) | uses_standard | uses_third, needs_q, uses_third)
    used = (uses_standard, uses_third)
    anchors = (tl.load(line + 2), tl.load(line + 3), tl.load(line + 4))
    means = (tl.load(line + 5), tl.load(line + 6), tl.load(line + 7))
    guard, _fixed = _guard(STATISTICS, row, bound, log_floor, GUARDED)

    P = _row(P, row, P_s, VECTOR)
    Q = _row(Q, row, Q_s, VECTOR)
    OUT = _row(OUT, row, OUT_s, VECTOR)
    if KIND != REVERSE_KL:
        R = _row(R, row, R_s, VECTOR)
    if KIND == VISUAL:
        N = _row(N, row, N_s, VECTOR)
    if OUT_SECOND is not None:
        OUT_SECOND = _row(OUT_SECOND, row, OUT_SECOND_s, VECTOR)

    begin = part * tiles * TILE
    stop = tl.minimum(begin + tiles * TILE, width)
    whole = begin + tl.maximum(tl.minimum(stop, V) - begin, 0) // TILE * TILE
    for start in range(begin, whole, TILE):
        _row_gradient(
            P, Q, R, N, OUT, OUT_SECOND, _columns(start, LOADS, LANES, VECTOR), maximum, inverse_sum, anchors, means,
            needs, used, w, second, guard, V, OUT_w, OUT_SECOND_w, student_multiplier, student_cap, teacher_multiplier,
            teacher_cap, KIND, GUARDED, STUDENT_FORM, TEACHER_FORM, TAIL, False,
        )  # fmt: skip
    for start in range(whole, stop, TILE):  # the tile that V cuts, and those that are padding only
        _row_gradient(
            P, Q, R, N, OUT, OUT_SECOND, _columns(start, LOADS, LANES, VECTOR), maximum, inverse_sum, anchors, means,
            needs, used, w, second, guard, V, OUT_w, OUT_SECOND_w, student_multiplier, student_cap, teacher_multiplier,
            teacher_cap, KIND, GUARDED, STUDENT_FORM, TEACHER_FORM, TAIL, True,
        )  # fmt: skip


# Launchers.


def _form(scale: float, softcap: float, temperature: float) -> tuple[int, float, float]:
    """(form, multiplier, cap) of `_transform`; work that would change nothing is left out when compiling."""
    if softcap:
        return SOFTCAP_FORM, scale / softcap, softcap / temperature
    multiplier = scale / temperature
    return (PLAIN_FORM if multiplier == 1.0 else SCALED_FORM), multiplier, 0.0


def _kind(streams: Streams) -> int:
    return sum(stream is not None for stream in streams) - 2


def _settings(streams: Streams, transform: LogitTransform) -> tuple[tuple[float, ...], dict[str, int]]:
    """The kernels' trailing scalars and the constants that depend on the transform."""
    student_form, *of_student = _form(transform.student_scale, transform.student_softcap, transform.temperature)
    teacher_form, *of_teacher = _form(transform.teacher_scale, transform.teacher_softcap, transform.temperature)
    bound = transform.ratio_bound or math.inf
    log_floor = math.log(transform.ratio_floor) if transform.ratio_floor else -math.inf
    constants = {
        "KIND": _kind(streams),
        "GUARDED": int(transform.guarded and streams.masked_student is not None),
        "STUDENT_FORM": student_form,
        "TEACHER_FORM": teacher_form,
    }
    return (*of_student, *of_teacher, bound, log_floor), constants


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
    streams: Streams,
    transform: LogitTransform,
    token_weights: Tensor | None = None,  # (tokens,): rows of weight 0 are not read, their results are 0
) -> tuple[Tensor, Tensor]:
    """`divergences` of `stream_kl/reference.py`: values (tokens, 5) and statistics (tokens, 13), float32.

    Raises:
        ValueError: float64 logits, or logits without unit stride along the vocabulary.
    """
    _check(streams)
    student = streams.student
    tokens, vocab = student.shape[0], transform.vocab_size
    values = student.new_empty((tokens, VALUES), dtype=torch.float32)
    statistics = student.new_empty((tokens, STATISTICS), dtype=torch.float32)
    if tokens == 0:
        return values, statistics
    if token_weights is not None:
        token_weights = token_weights.contiguous()
    scalars, constants = _settings(streams, transform)
    device = config.describe_device(student.device)
    vector = config.LOAD_BYTES // student.element_size()

    def launch(warps: int | None, guarded: int = 0) -> None:
        shape = config.geometry(device, student.element_size(), warps, aligned=_aligned(streams, vector))
        splits, tiles = config.split_row(device, shape, tokens, vocab)
        options = config.forward_options(device, shape, constants["KIND"])
        workspace = None
        if splits > 1:
            workspace = values.new_empty((tokens, splits, WORKSPACE_STATES))
        divergences_kernel[(tokens, splits)](
            *streams, token_weights, values, statistics, workspace, *map(_stride, streams), vocab, tiles, splits,
            *scalars, **(constants | {"GUARDED": guarded}), **_tile(shape, vocab), **options,
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(tokens,)](
                workspace, token_weights, values, statistics, splits, KIND=constants["KIND"], GUARDED=guarded,
                PARTS=triton.next_power_of_2(splits), num_warps=1,
            )  # fmt: skip

    with torch.cuda.device_of(student):
        warps = _warps(launch, ("divergences", tokens, vocab, student.dtype, *constants.values()), student.device)
        launch(warps)
        if constants["GUARDED"]:  # again, with the normalisers of p0 and r known
            launch(warps, 1)
    return values, statistics


def logit_gradients(
    streams: Streams,
    values: Tensor,  # (tokens, 5), of `divergences`
    statistics: Tensor,  # (tokens, 13), of `divergences`
    coefficients: Tensor,  # (tokens, 3): d objective / d values
    transform: LogitTransform,
    *,
    out: Tensor,  # (tokens, >= vocab)
    second_coefficients: Tensor | None = None,  # (tokens, 3): of a second objective of the same rows
    out_second: Tensor | None = None,  # (tokens, >= vocab)
    column_squares: Tensor | None = None,  # (objectives, vocab), float32
) -> None:
    """`logit_gradients` of `stream_kl/reference.py`: writes the outputs, each of which may be an input.

    Raises:
        ValueError: float64 logits or outputs, or tensors without unit stride along the vocabulary.
    """
    outputs = (out, out_second)
    _check((*streams, *outputs))
    student = streams.student
    tokens, vocab = student.shape[0], transform.vocab_size
    if tokens == 0:
        if column_squares is not None:
            column_squares.zero_()
        return
    if second_coefficients is not None:
        second_coefficients = second_coefficients.contiguous()
    rows = (values.contiguous(), statistics.contiguous(), coefficients.contiguous(), second_coefficients)
    scalars, constants = _settings(streams, transform)
    device = config.describe_device(student.device)
    vector = config.LOAD_BYTES // student.element_size()
    widths = tuple(0 if tensor is None else tensor.shape[1] for tensor in outputs)

    def launch(warps: int | None, outputs: tuple[Tensor | None, ...] = outputs) -> None:
        shape = config.geometry(device, student.element_size(), warps, aligned=_aligned((*streams, *outputs), vector))
        splits, tiles = config.split_row(device, shape, tokens, max(widths))
        columns = (vocab, *(tensor.shape[1] for tensor in outputs if tensor is not None))
        gradients_kernel[(tokens, splits)](
            *streams, *rows, *outputs, *map(_stride, (*streams, *outputs)), *widths, vocab, max(widths), tiles,
            *scalars, **constants, **_tile(shape, *columns), num_warps=shape.warps,
        )  # fmt: skip

    def trial(warps: int) -> None:
        # Timing repeats the launch: into scratch, because outputs may be inputs.
        launch(warps, tuple(None if tensor is None else torch.empty_like(tensor) for tensor in outputs))

    with torch.cuda.device_of(student):
        key = ("gradients", tokens, max(widths), vocab, student.dtype, out.dtype, out_second is None,
               *constants.values())  # fmt: skip
        launch(_warps(trial, key, student.device))
    if column_squares is not None:
        # Read once more: a program has a part of a row, and columns would need atomics, whose order varies.
        written = [tensor[:, :vocab] for tensor in outputs if tensor is not None]
        for squares, tensor in zip(column_squares, written, strict=True):
            squares.copy_(torch.linalg.vector_norm(tensor, dim=0, dtype=torch.float32).square_())

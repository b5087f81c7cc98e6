"""The Triton kernels behind `divergences` of `stream_kl`. The legend is in `triton.py`.

The loop over whole tiles is there twice. The first takes every logit to be finite, and does without the selects,
comparisons and holes that -inf asks for: about half of the instructions. What is not finite makes some sum of its lane
infinite or NaN, and then the program walks its part of the row again, with care. One decision a program, on the device.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    INF,
    REVERSE_KL,
    SMALLEST,
    STATISTIC_COLUMNS,
    VALUE_COLUMNS,
    VISUAL,
    _columns,
    _exp,
    _guard,
    _inside,
    _log,
    _normalizers,
    _ratio,
    _row,
    _smooth,
    _transform,
)

WORKSPACE_STATES = 22  # numbers that describe a part of a row, the tuple `state`
STATES = tl.constexpr(WORKSPACE_STATES)
LOWEST = tl.constexpr(-1e30)  # the maximum of nothing, where -inf would need care


@triton.jit
def _sum(tile):
    return tl.sum(tl.sum(tile, 2), 0)


@triton.jit
def _max(tile):
    return tl.max(tl.max(tile, 2), 0)


# The state of a part of a row, and how it grows.


@triton.jit
def _by_lane(tile):
    """[LOADS, LANES, VECTOR] -> [LANES, LOADS * VECTOR]"""
    return tl.reshape(tl.permute(tile, (1, 0, 2)), [tile.shape[1], tile.shape[0] * tile.shape[2]])


@triton.jit
def _halves(x):
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _chosen(higher, x):
    first, other = _halves(x)
    return tl.where(higher, other, first)


@triton.jit
def _highest(p, q, r, n, KIND: tl.constexpr):
    """One column a lane, (LANES, 1): that where p is largest."""
    if p.shape[1] > 1:
        first, other = _halves(p)
        higher = other > first
        p, q = tl.where(higher, other, first), _chosen(higher, q)
        if KIND != REVERSE_KL:
            r = _chosen(higher, r)
        if KIND == VISUAL:
            n = _chosen(higher, n)
        p, q, r, n = _highest(p, q, r, n, KIND)
    return p, q, r, n


@triton.jit
def _peak(zp, zq, zr, zn, KIND: tl.constexpr):
    """Every lane's largest z of p in a tile, and z of the other streams in that column. A tree of comparisons within a
    thread: looking each stream up where p has its maximum takes twice as many instructions."""
    p, q = _by_lane(zp), _by_lane(zq)
    r, n = q, q
    if KIND != REVERSE_KL:
        r = _by_lane(zr)
    if KIND == VISUAL:
        n = _by_lane(zn)
    p, q, r, n = _highest(p, q, r, n, KIND)
    return tl.max(p, 1), tl.max(q, 1), tl.max(r, 1), tl.max(n, 1)


@triton.jit
def _base(m, CAREFUL: tl.constexpr):
    """What is subtracted from z: its maximum, but 0 where there is no mass yet, never -inf - -inf."""
    if CAREFUL:
        m = tl.where(m == -INF, 0.0, m)
    return m


@triton.jit
def _stream(z, top, m, s, CAREFUL: tl.constexpr):
    """One stream meets a tile, whose largest z is `top`. Returns distances, weights, the new maximum and sum, the
    factor of old weights and the shift of old distances."""
    above = tl.maximum(m, top)
    base = _base(above, CAREFUL)
    shift = base - m
    factor = _exp(-shift)
    if CAREFUL:
        shift = tl.where(m == -INF, 0.0, shift)
    a = z - base[None, :, None]
    e = _exp(a)
    return a, e, above, s * factor + _sum(e), factor, shift


@triton.jit
def _moved(total, s, factor, shift, CAREFUL: tl.constexpr):
    moved = (total - s * shift) * factor
    if CAREFUL:  # weight that vanished takes its sum along, even one that overflowed: 0 * inf would be NaN
        moved = tl.where(factor > 0, moved, 0.0)
    return moved


@triton.jit
def _anchored(z, there, c, raised, CAREFUL: tl.constexpr):
    """Distances from a stream's anchor, that anchor after a tile, and its step: it is z where p has its maximum, where
    the tile raised that."""
    if CAREFUL:
        there = tl.where(tl.abs(there) == INF, 0.0, there)
    anchor = tl.where(raised, there, c)
    return z - anchor[None, :, None], anchor, anchor - c


@triton.jit
def _pair(total, hole, s, factor, shift, a, e, m, d, there, CAREFUL: tl.constexpr):
    """Sum of e * d and hole of a pair of streams after a tile: e, a and m are weights, distances and maximum of the
    first, `there` is where the second has mass, `shift` that of d."""
    total = _moved(total, s, factor, shift, CAREFUL)
    if CAREFUL:
        total += _sum(tl.where((e > 0) & there, e * d, 0.0))
        hole = tl.maximum(hole, _max(tl.where(there, -INF, a)) + m)
    else:
        total += _sum(e * d)
    return total, hole


@triton.jit
def _target(u, m, s, CAREFUL: tl.constexpr):
    """Maximum and sum of the visual target after a tile of its distances."""
    top = tl.maximum(m, _max(u))
    base = _base(top, CAREFUL)
    return top, s * _exp(m - base) + _sum(_exp(u - base[None, :, None]))


@triton.jit
def _grow(state, zp, zq, zr, zn, fixed, guard, KIND: tl.constexpr, GUARDED: tl.constexpr, CAREFUL: tl.constexpr):
    """The state after one more tile. `fixed`: anchors of r and n that the guard's offset goes with."""
    mp, sp, mq, sq, mr, sr, mn, sn, mt, st, self, pq, pt, nr, qr, c_q, c_r, c_n, h_pq, h_pt, h_nr, h_qr = state
    top, at_q, at_r, at_n = _peak(zp, zq, zr, zn, KIND)
    raised = top > mp
    ap, ep, mp, sp_new, fp, dp = _stream(zp, top, mp, sp, CAREFUL)
    self = _moved(self, sp, fp, dp, CAREFUL)
    if CAREFUL:
        self += _sum(tl.where(ep > 0, ep * ap, 0.0))
    else:
        self += _sum(ep * ap)

    uq, new_q, step_q = _anchored(zq, at_q, c_q, raised, CAREFUL)
    there_q = uq != -INF
    pq, h_pq = _pair(pq, h_pq, sp, fp, dp - step_q, ap, ep, mp, ap - uq, there_q, CAREFUL)
    aq, eq, mq, sq_new, fq, _dq = _stream(zq, _max(zq), mq, sq, CAREFUL)
    if KIND != REVERSE_KL:
        ur, new_r, step_r = _anchored(zr, at_r, c_r, raised, CAREFUL)
        there_r = ur != -INF
        _ar, _er, mr, sr, _fr, _dr = _stream(zr, _max(zr), mr, sr, CAREFUL)
        if KIND != VISUAL:
            pt, h_pt = _pair(pt, h_pt, sp, fp, dp - step_r, ap, ep, mp, ap - ur, there_r, CAREFUL)
        else:
            un, new_n, step_n = _anchored(zn, at_n, c_n, raised, CAREFUL)
            an, en, mn, sn_new, fn, _dn = _stream(zn, _max(zn), mn, sn, CAREFUL)
            nr, h_nr = _pair(nr, h_nr, sn, fn, step_n - step_r, an, en, mn, un - ur, there_r, CAREFUL)
            qr, h_qr = _pair(qr, h_qr, sq, fq, step_q - step_r, aq, eq, mq, uq - ur, there_r, CAREFUL)
            sn = sn_new
            if GUARDED:
                fixed_r, fixed_n = fixed
                ur, un = zr - fixed_r, zn - fixed_n
                step_t = step_q
            else:
                step_t = step_q + (step_n - step_r)
            ut = uq + _ratio(ur, un, zq, guard, GUARDED, CAREFUL)
            mt -= step_t
            finite = ut
            if CAREFUL:
                ut = tl.where(there_q, ut, -INF)
                finite = tl.where(ut == INF, -INF, ut)
                # No distribution: the hole is infinite whatever mass p has there.
                h_pt = tl.maximum(h_pt, _max(tl.where(ut == INF, INF, -INF)))
            there_t = finite != -INF
            pt, h_pt = _pair(pt, h_pt, sp, fp, dp - step_t, ap, ep, mp, ap - ut, there_t, CAREFUL)
            mt, st = _target(finite, mt, st, CAREFUL)
            c_n = new_n
        c_r = new_r
    return (
        mp, sp_new, mq, sq_new, mr, sr, mn, sn, mt, st, self, pq, pt, nr, qr, new_q, c_r, c_n, h_pq, h_pt, h_nr, h_qr,
    )  # fmt: skip


@triton.jit
def _all_finite(state):
    """Whether no lane has met a logit that is not finite: by the sums of a state that was formed without care."""
    total = state[1] + state[3] + state[5] + state[7]  # sp sq sr sn
    for index in tl.static_range(9, 15):  # st self pq pt nr qr
        total += state[index]
    return tl.min((total * 0.0 == 0.0).to(tl.int32), 0) != 0


# How parts of a row merge, and what is written of it.


@triton.jit
def _rise(m, top):
    """From maximum m to `top`: what to subtract from z, the factor of old weights, the shift of old distances.

    A stream without mass yet has m = -inf: it subtracts 0 and shifts by 0, never -inf - -inf.
    """
    anchor = tl.where(top == -INF, 0.0, top)
    return anchor, _exp(m - anchor), tl.where(m == -INF, 0.0, anchor - m)


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
    self = tl.sum(_moved(self, sp, fp, dp, True), 0)
    pq = tl.sum(_moved(pq, sp, fp, dp - step_q, True), 0)
    pt = tl.sum(_moved(pt, sp, fp, dp - step_t, True), 0)
    nr = tl.sum(_moved(nr, sn, fn, step_n - step_r, True), 0)
    qr = tl.sum(_moved(qr, sq, fq, step_q - step_r, True), 0)
    h_pq, h_pt, h_nr, h_qr = tl.max(h_pq, 0), tl.max(h_pt, 0), tl.max(h_nr, 0), tl.max(h_qr, 0)
    return (
        top_p, sp_all, mq, sq_all, mr, sr, mn, sn_all, mt, st, self, pq, pt, nr, qr, new_q, new_r, new_n,
        h_pq, h_pt, h_nr, h_qr,
    )  # fmt: skip


@triton.jit
def _divergence(mean, s_from, s_to, m_to, hole, normalizer):
    """KL from a finished pair, m_to relative to where the mean's distances begin; +inf where the first distribution has
    mass that the second lacks."""
    kl = mean + _log(s_to / s_from) + m_to  # one logarithm of the ratio: two would cancel
    kl = tl.where(_exp(hole - normalizer) >= SMALLEST, INF, kl)
    return tl.where(s_from == 0, 0.0, kl)  # no mass at all: nothing to sum


@triton.jit
def _finish(state, row, active, OUT, STATISTICS, KIND: tl.constexpr, SMOOTHED: tl.constexpr):
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
    line = OUT + row * VALUE_COLUMNS
    tl.store(line, tl.where(active, entropy, 0.0))
    tl.store(line + 1, tl.where(active, standard, 0.0))
    tl.store(line + 2, tl.where(active, third, 0.0))
    tl.store(line + 3, tl.where(active, language, 0.0))
    tl.store(line + 4, tl.where(active, dependency, 0.0))
    line = STATISTICS + row * STATISTIC_COLUMNS
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
    if not SMOOTHED:  # the normalizers are there already
        tl.store(line + 13, 0.0)
        tl.store(line + 14, 0.0)


@triton.jit
def _load(
    X,
    columns,
    inside,
    multiplier,
    cap,
    normalizer,
    share,
    FORM: tl.constexpr,
    SMOOTHED: tl.constexpr,
    PTX: tl.constexpr,
    MASKED: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A tile of z, [LOADS, LANES, VECTOR]; -inf outside, after the transform (tanh would make it finite)."""
    if MASKED:
        z = _transform(tl.load(X + columns, mask=inside, other=0.0), multiplier, cap, FORM)
        z = tl.where(inside, _smooth(z, normalizer, share, SMOOTHED, PTX), -INF)
    else:
        z = _smooth(_transform(tl.load(X + columns), multiplier, cap, FORM), normalizer, share, SMOOTHED, PTX)
    return tl.reshape(z, [z.shape[0], z.shape[1] // VECTOR, VECTOR])


@triton.jit
def _read(
    P, Q, R, N, columns, inside, student_multiplier, student_cap, teacher_multiplier, teacher_cap, normalizers, share,
    KIND: tl.constexpr, STUDENT_FORM: tl.constexpr, TEACHER_FORM: tl.constexpr, SMOOTHED: tl.constexpr,
    PTX: tl.constexpr, MASKED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    of_q, of_r = normalizers
    zp = _load(
        P, columns, inside, student_multiplier, student_cap, 0.0, share, STUDENT_FORM, False, PTX, MASKED, VECTOR
    )
    zq = _load(
        Q, columns, inside, teacher_multiplier, teacher_cap, of_q, share, TEACHER_FORM, SMOOTHED, PTX, MASKED, VECTOR
    )
    zr, zn = zq, zp
    if KIND != REVERSE_KL:
        zr = _load(
            R,
            columns,
            inside,
            teacher_multiplier,
            teacher_cap,
            of_r,
            share,
            TEACHER_FORM,
            SMOOTHED,
            PTX,
            MASKED,
            VECTOR,
        )
    if KIND == VISUAL:
        zn = _load(
            N, columns, inside, student_multiplier, student_cap, 0.0, share, STUDENT_FORM, False, PTX, MASKED, VECTOR
        )
    return zp, zq, zr, zn


@triton.jit
def _unless(done, state, low, zero):
    """The state, or that of nothing."""
    mp, sp, mq, sq, mr, sr, mn, sn, mt, st, self, pq, pt, nr, qr, c_q, c_r, c_n, h_pq, h_pt, h_nr, h_qr = state
    return (
        tl.where(done, mp, low), tl.where(done, sp, zero), tl.where(done, mq, low), tl.where(done, sq, zero),
        tl.where(done, mr, low), tl.where(done, sr, zero), tl.where(done, mn, low), tl.where(done, sn, zero),
        tl.where(done, mt, low), tl.where(done, st, zero), tl.where(done, self, zero), tl.where(done, pq, zero),
        tl.where(done, pt, zero), tl.where(done, nr, zero), tl.where(done, qr, zero), tl.where(done, c_q, zero),
        tl.where(done, c_r, zero), tl.where(done, c_n, zero), h_pq, h_pt, h_nr, h_qr,
    )  # fmt: skip


FORWARD_ARGUMENTS = (
    "P", "Q", "R", "N", "WEIGHTS", "OUT", "STATISTICS", "WORKSPACE", "P_s", "Q_s", "R_s", "N_s", "V", "tiles",
    "splits", "student_multiplier", "student_cap", "teacher_multiplier", "teacher_cap", "bound", "log_floor", "share",
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
    STATISTICS,  # (tokens, 15): with a guard those of a launch without, and smoothed teachers' normalizers, are in it
    WORKSPACE,  # (tokens, splits, STATES) or None: the parts of split rows
    P_s, Q_s, R_s, N_s,
    V, tiles, splits,
    student_multiplier, student_cap, teacher_multiplier, teacher_cap, bound, log_floor, share,
    KIND: tl.constexpr, GUARDED: tl.constexpr, STUDENT_FORM: tl.constexpr, TEACHER_FORM: tl.constexpr,
    SMOOTHED: tl.constexpr, PTX: tl.constexpr,
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
    normalizers = _normalizers(STATISTICS, row, SMOOTHED)

    low = tl.full([LANES], -INF, tl.float32)
    lowest = tl.full([LANES], LOWEST, tl.float32)
    zero = tl.zeros([LANES], tl.float32)
    state = (
        lowest, zero, lowest, zero, lowest, zero, lowest, zero, lowest, zero, zero, zero, zero, zero, zero, zero, zero,
        zero, low, low, low, low,
    )  # fmt: skip
    for start in range(begin, whole, TILE):
        zp, zq, zr, zn = _read(
            P, Q, R, N, _columns(start, LOADS, LANES, VECTOR), True, student_multiplier, student_cap,
            teacher_multiplier, teacher_cap, normalizers, share, KIND, STUDENT_FORM, TEACHER_FORM, SMOOTHED, PTX, False,
            VECTOR,
        )  # fmt: skip
        state = _grow(state, zp, zq, zr, zn, fixed, guard, KIND, GUARDED, False)
    done = (whole > begin) & _all_finite(state)
    state = _unless(done, state, low, zero)
    for start in range(tl.where(done, whole, begin), whole, TILE):  # once more, with care
        zp, zq, zr, zn = _read(
            P, Q, R, N, _columns(start, LOADS, LANES, VECTOR), True, student_multiplier, student_cap,
            teacher_multiplier, teacher_cap, normalizers, share, KIND, STUDENT_FORM, TEACHER_FORM, SMOOTHED, PTX, False,
            VECTOR,
        )  # fmt: skip
        state = _grow(state, zp, zq, zr, zn, fixed, guard, KIND, GUARDED, True)
    if whole < stop:  # the last, partial tile is the only one that pays for a mask
        columns = _columns(whole, LOADS, LANES, VECTOR)
        zp, zq, zr, zn = _read(
            P, Q, R, N, columns, _inside(columns, stop, TAIL), student_multiplier, student_cap, teacher_multiplier,
            teacher_cap, normalizers, share, KIND, STUDENT_FORM, TEACHER_FORM, SMOOTHED, PTX, True, VECTOR,
        )  # fmt: skip
        state = _grow(state, zp, zq, zr, zn, fixed, guard, KIND, GUARDED, True)

    state = _merge(state, KIND, GUARDED)
    if WORKSPACE is None:
        _finish(state, row, active, OUT, STATISTICS, KIND, SMOOTHED)
    else:
        line = WORKSPACE + (row * splits + part) * STATES
        for i in tl.static_range(STATES):
            tl.store(line + i, state[i])


@triton.jit(do_not_specialize=("WORKSPACE", "WEIGHTS", "OUT", "STATISTICS", "splits"))
def merge_kernel(
    WORKSPACE,  # (tokens, splits, STATES)
    WEIGHTS,  # (tokens,) or None
    OUT,  # (tokens, 5)
    STATISTICS,  # (tokens, 15)
    splits,
    KIND: tl.constexpr,
    GUARDED: tl.constexpr,
    SMOOTHED: tl.constexpr,
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
    _finish(_merge(state, KIND, GUARDED), row, active, OUT, STATISTICS, KIND, SMOOTHED)

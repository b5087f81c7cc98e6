"""The Triton kernel behind `logit_gradients` of `stream_kl`: a second look. The legend is in `triton.py`."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    INF,
    REVERSE_KL,
    SCALED,
    SMALLEST,
    SOFTCAPPED,
    STATISTIC_COLUMNS,
    VALUE_COLUMNS,
    VISUAL,
    _columns,
    _exp,
    _guard,
    _inside,
    _normalizers,
    _ratio,
    _row,
    _smooth,
    _transform,
)


@triton.jit
def _coefficient(COEFFICIENTS, row, column: tl.constexpr, inverse_sum):
    """A coefficient over the sum that makes exp(z - maximum) a probability."""
    return tl.load(COEFFICIENTS + row * 3 + column).to(tl.float32) * inverse_sum


@triton.jit
def _look(
    X, columns, inside, needed, multiplier, cap, normalizer, share,
    FORM: tl.constexpr, SMOOTHED: tl.constexpr, PTX: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of z, not read (and 0) unless `needed`; a mask that is the same everywhere keeps loads wide."""
    mask = needed
    if MASKED:
        mask = inside & needed
    z = _transform(tl.load(X + columns, mask=mask, other=0.0), multiplier, cap, FORM)
    return _smooth(z, normalizer, share, SMOOTHED, PTX)


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
    normalizers, V, OUT_w, OUT_SECOND_w, student_multiplier, student_cap, teacher_multiplier, teacher_cap, share,
    KIND: tl.constexpr, GUARDED: tl.constexpr, STUDENT_FORM: tl.constexpr, TEACHER_FORM: tl.constexpr,
    SMOOTHED: tl.constexpr, PTX: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile: g = p * sum of w * (difference - its mean) * dz/dx.

    p is exp(zp - maximum) here: 1 / sum is in the coefficients.
    """
    c_q, c_r, c_n = anchors
    mean_entropy, mean_standard, mean_third = means
    needs_p, needs_q, needs_rest = needs
    uses_standard, uses_third = used
    of_q, of_r = normalizers
    inside = True
    if MASKED:
        inside = _inside(columns, V, TAIL)
    zp = _look(
        P, columns, inside, needs_p, student_multiplier, student_cap, 0.0, share, STUDENT_FORM, False, PTX, MASKED
    )
    zq = _look(
        Q, columns, inside, needs_q, teacher_multiplier, teacher_cap, of_q, share, TEACHER_FORM, SMOOTHED, PTX, MASKED
    )  # fmt: skip
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
        zr = _look(
            R, columns, inside, needs_rest, teacher_multiplier, teacher_cap, of_r, share, TEACHER_FORM, SMOOTHED, PTX,
            MASKED,
        )  # fmt: skip
        ut = zr - c_r
        if KIND == VISUAL:
            zn = _look(
                N, columns, inside, needs_rest, student_multiplier, student_cap, 0.0, share, STUDENT_FORM, False, PTX,
                MASKED,
            )  # fmt: skip
            un = zn - c_n
            ut = uq + _ratio(ut, un, zq, guard, GUARDED, True)
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
    "student_cap", "teacher_multiplier", "teacher_cap", "bound", "log_floor", "share",
)  # fmt: skip


@triton.jit(do_not_specialize=GRADIENT_ARGUMENTS)
def gradients_kernel(
    P,  # (tokens, >= V)
    Q,  # (tokens, >= V)
    R,  # (tokens, >= V) or None
    N,  # (tokens, >= V) or None
    VALUES_,  # (tokens, 5)
    STATISTICS,  # (tokens, 15)
    COEFFICIENTS,  # (tokens, 3)
    SECOND,  # (tokens, 3) or None
    OUT,  # (tokens, OUT_w)
    OUT_SECOND,  # (tokens, OUT_SECOND_w) or None
    P_s, Q_s, R_s, N_s, OUT_s, OUT_SECOND_s, OUT_w, OUT_SECOND_w,
    V, width, tiles,
    student_multiplier, student_cap, teacher_multiplier, teacher_cap, bound, log_floor, share,
    KIND: tl.constexpr, GUARDED: tl.constexpr, STUDENT_FORM: tl.constexpr, TEACHER_FORM: tl.constexpr,
    SMOOTHED: tl.constexpr, PTX: tl.constexpr,
    TAIL: tl.constexpr, LOADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = LOADS * LANES * VECTOR
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    line = STATISTICS + row * STATISTIC_COLUMNS
    maximum, inverse_sum = tl.load(line), tl.load(line + 1)
    w = (_coefficient(COEFFICIENTS, row, 0, inverse_sum), _coefficient(COEFFICIENTS, row, 1, inverse_sum),
         _coefficient(COEFFICIENTS, row, 2, inverse_sum))  # fmt: skip
    second = w
    if SECOND is not None:
        second = (_coefficient(SECOND, row, 0, inverse_sum), _coefficient(SECOND, row, 1, inverse_sum),
                  _coefficient(SECOND, row, 2, inverse_sum))  # fmt: skip
    # A number is used when a coefficient asks for it, unless its value is infinite: no direction.
    uses_standard = ((w[1] != 0) | (second[1] != 0)) & (tl.abs(tl.load(VALUES_ + row * VALUE_COLUMNS + 1)) != INF)
    uses_third = ((w[2] != 0) | (second[2] != 0)) & (tl.abs(tl.load(VALUES_ + row * VALUE_COLUMNS + 2)) != INF)
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
    normalizers = _normalizers(STATISTICS, row, SMOOTHED)

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
            needs, used, w, second, guard, normalizers, V, OUT_w, OUT_SECOND_w, student_multiplier, student_cap,
            teacher_multiplier, teacher_cap, share, KIND, GUARDED, STUDENT_FORM, TEACHER_FORM, SMOOTHED, PTX, TAIL,
            False,
        )  # fmt: skip
    for start in range(whole, stop, TILE):  # the tile that V cuts, and those that are padding only
        _row_gradient(
            P, Q, R, N, OUT, OUT_SECOND, _columns(start, LOADS, LANES, VECTOR), maximum, inverse_sum, anchors, means,
            needs, used, w, second, guard, normalizers, V, OUT_w, OUT_SECOND_w, student_multiplier, student_cap,
            teacher_multiplier, teacher_cap, share, KIND, GUARDED, STUDENT_FORM, TEACHER_FORM, SMOOTHED, PTX, TAIL,
            True,
        )  # fmt: skip

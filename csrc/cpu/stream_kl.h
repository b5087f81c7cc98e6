// What the launcher (stream_kl.cpp) and the kernels of every instruction-set level share. No library templates: see
// kernels.h. vgs_kernels/stream_kl/reference.py says what is computed.
#pragma once

#include "element.h"

namespace vgs::stream_kl {

// Streams: student p, teacher q, masked teacher r, masked student p0. Those that are given make the kind.
enum { kP, kQ, kR, kP0, kStreams };
enum Kind { kReverse, kPrior, kVisual };

// Columns of `values`, the first kCoefficients of which have a gradient.
enum { kEntropy, kStandard, kThird, kLanguage, kDependency, kValues };
constexpr int kCoefficients = 3;
constexpr int kBase[kValues] = {kP, kP, kP, kP0, kQ};  // the expectation is under it

// First columns of `statistics`; anchors and log sums are of q, r, p0, tops and normalizers of q and r.
enum { kMaximum = 0, kInverseSum = 1, kAnchor = 2, kMean = 5, kLogSum = 8, kTop = 11, kNormalizer = 13, kStatistics = 15 };

// Vocabulary entries of one partial result. Fixed, so that results do not depend on the number of threads.
constexpr int64_t kSegment = 16384;

// The same where all rows of a segment are walked before the next segment: sums over rows stay in the first-level cache.
constexpr int64_t kColumnSegment = 2048;

// One stream of logits x: z = x * scale, or z = softcap_out * tanh(x * softcap_in) where softcap_out != 0; and then
// z = log(exp(z - normalizer of the row) + share) where share != 0.
struct Stream {
  const void* data;  // null where it is not given
  int64_t row_stride;  // elements
  double scale;
  double softcap_in;
  double softcap_out;
  double share;  // of the uniform distribution, over the vocabulary
  const void* normalizer;  // of the first row, in the accumulation type; that of the next is kStatistics further
};

struct Streams {
  Stream stream[kStreams];
  Element element;
  Kind kind;
};

// Logits at the place where another stream has its maximum; 0 where they are not finite.
enum { kQAtP, kRAtP, kP0AtP, kRAtP0, kRAtQ, kAnchors };
constexpr int kAnchored[kAnchors] = {kQ, kR, kP0, kR, kR};
constexpr int kAnchoredAt[kAnchors] = {kP, kP, kP, kP0, kQ};

// Sums over part of a row, relative to a shift per stream (the running maximum, 0 while all is -inf) and to the anchors.
// With e = exp(z_base - shift), the distances z_base - shift and z_other - anchor are both 0 where the base has its
// maximum, so that the moment of a row with all its mass on one entry is exactly 0, however large and differently rounded
// its logits. The target q* of a visual row is known by its distance from its anchors alone.
struct RowState {
  double maximum[kStreams];
  double sum[kStreams];  // sum exp(z - shift)
  double anchor[kAnchors];
  double moment[kValues];  // sum e (z_base - shift), then sum e ((z_base - shift) - distance of the other stream)
  double hole[kValues];  // largest z_base where the other stream of that column is -inf
  double target_maximum, target_sum;  // of the distances of q*
  bool improper;  // r has no mass where q and p0 have some
};

// How the distance of q* from its anchors is formed: (z_q - anchor) + ratio, the ratio being that of log p0 - log r.
struct Target {
  double anchor[3];  // of q, r, p0
  bool guarded;  // whether the rest applies; then the anchor is that of q alone
  double log_ratio;  // of the sums of p0 and of r, by their distances from their anchors
  double bound;  // of the ratio
  double least;  // z_q - anchor below which the ratio is 0
};

// What a row of the gradient needs besides the logits. The weights of what is absent are 0.
struct GradientRow {
  double maximum, inverse_sum;
  double mean[kCoefficients];
  double weight[2][kCoefficients];  // of each objective
  bool uses_standard, uses_third;
  Target target;
};

struct GradientOutputs {
  void* row[2];  // start of the row, or null; may alias an input row of the same dtype
  float* squares[2];  // by vocabulary entry; the squares of what is written are added, unless null
  Element element;
};

// Entries [begin, end) of a row, and the position that is wanted after them, to be fetched meanwhile.
struct Span {
  int64_t row, begin, end, next_row, next_begin;
};

// Move the sums of `state` to larger maxima and other anchors. Exact up to rounding: with D = new - old shift or anchor,
// sum e' = exp(-D_base) sum e, and the moment's differences grow by D_anchor - D_base.
static inline void rescale(RowState& state, Kind kind, const double maximum[kStreams], const double anchor[kAnchors]) {
  const double infinity = __builtin_inf();
  double step[kStreams], factor[kStreams], growth[kAnchors];
  bool moved = false;
  for (int s = 0; s < kStreams; ++s) {
    const double before = state.maximum[s] == -infinity ? 0.0 : state.maximum[s];
    const double after = maximum[s] == -infinity ? 0.0 : maximum[s];
    step[s] = after - before;
    // Before the first finite entry the sum is 0, and the step may be of either sign.
    factor[s] = state.maximum[s] == -infinity ? 0.0 : (step[s] == 0.0 ? 1.0 : __builtin_exp(-step[s]));
    moved |= step[s] != 0.0 || factor[s] != 1.0;
    state.maximum[s] = maximum[s];
  }
  for (int a = 0; a < kAnchors; ++a) {
    growth[a] = anchor[a] - state.anchor[a];
    moved |= growth[a] != 0.0;  // also of equal maxima in two places
    state.anchor[a] = anchor[a];
  }
  if (!moved) return;
  const double of_target = growth[kQAtP] + (growth[kP0AtP] - growth[kRAtP]);
  const double of_column[kValues] = {0.0, growth[kQAtP], kind == kVisual ? of_target : growth[kRAtP], growth[kRAtP0],
                                     growth[kRAtQ]};
  for (int c = 0; c < kValues; ++c) {
    const int base = kBase[c];
    state.moment[c] =
        factor[base] == 0.0 ? 0.0 : factor[base] * (state.moment[c] + (of_column[c] - step[base]) * state.sum[base]);
  }
  for (int s = 0; s < kStreams; ++s) state.sum[s] *= factor[s];
  state.target_maximum -= of_target;
}

// The same for the sum of q*.
static inline void raise_target(RowState& state, double maximum) {
  if (!(maximum > state.target_maximum)) return;
  // Before the first finite entry the sum is 0.
  state.target_sum = state.target_sum == 0.0 ? 0.0 : state.target_sum * __builtin_exp(state.target_maximum - maximum);
  state.target_maximum = maximum;
}

}  // namespace vgs::stream_kl

namespace vgs {

struct StreamKLKernels {
  // Add entries [begin, end) of a row to `state`; `with_target` says whether those of q* are among the sums.
  void (*divergences)(const stream_kl::Streams&, bool with_target, int64_t row, int64_t begin, int64_t end,
                      stream_kl::RowState& state);
  // Add those of a guarded q* to `state`, whose maximum and anchors are those of the whole row.
  void (*target)(const stream_kl::Streams&, const stream_kl::Target&, int64_t row, int64_t begin, int64_t end,
                 stream_kl::RowState& state);
  // Write the gradient of a span.
  void (*gradients)(const stream_kl::Streams&, const stream_kl::GradientRow&, const stream_kl::Span&,
                    const stream_kl::GradientOutputs&);
};

}  // namespace vgs

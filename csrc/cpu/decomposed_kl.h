// What the launcher (decomposed_kl.cpp) and the kernels of every instruction-set level share. No library templates: see
// kernels.h.
#pragma once

#include "element.h"

namespace vgs {

// Index of a stream: p student, q teacher, r masked teacher, p0 masked student.
enum { kP, kQ, kR, kP0, kStreams };

// Columns of `values`, as in vgs_kernels/decomposed_kl/reference.py.
enum { kEntropy, kFull, kPrior, kShift, kMasked, kValues };

// The two streams of a column: the expectation is under `base`. Entropy has no other.
constexpr int kBase[kValues] = {kP, kP, kP, kP, kP0};
constexpr int kOther[kValues] = {-1, kQ, kR, kP0, kR};

// First columns of `statistics`: maximum and 1 / sum of p and p0, anchors of the columns after entropy, means of all.
enum { kMaximum = 0, kInverseSum = 2, kAnchor = 4, kMean = kAnchor + kValues - 1, kStatistics = kMean + kValues };

enum Decomposition { kTeacherPrior, kBayes, kMatched, kDecompositions };

// Vocabulary entries of one partial result. Fixed, so that results do not depend on the number of threads.
constexpr int64_t kSegment = 16384;

// The same where all rows of a segment are walked before the next segment: sums over rows stay in the first-level cache.
constexpr int64_t kColumnSegment = 2048;

// One stream of logits x: z = x * scale, or z = softcap_out * tanh(x * softcap_in) where softcap_out != 0.
struct Stream {
  const void* data;  // null where the decomposition has no such stream
  int64_t row_stride;  // elements
  double scale;
  double softcap_in;
  double softcap_out;
};

struct Streams {
  Stream stream[kStreams];
  Element element;
};

// Sums over part of a row, relative to a shift per stream (the running maximum, 0 while all is -inf) and an anchor per
// column: the other stream's logit where the base stream has its maximum (0 where that is not finite). With
// e = exp(z_base - shift_base), the distances z_base - shift_base and z_other - anchor are both 0 at that entry, so that
// the moment of a row with all its mass on one entry is exactly 0, however large and differently rounded its logits.
struct RowState {
  double maximum[kStreams];
  double sum[kStreams];  // sum exp(z_s - shift_s)
  double anchor[kValues];
  double moment[kValues];  // sum e (z_base - shift_base), then sum e ((z_base - shift_base) - (z_other - anchor))
  double hole[kValues];  // largest z_base where the other stream of that column is -inf
};

// What a row of the gradient needs besides the logits. An `absent` column has an infinite value and takes no part.
struct GradientRow {
  double maximum[kStreams], inverse_sum[kStreams];  // of p and p0
  double anchor[kValues];
  double mean[kValues];  // moment / sum
  double weight[kValues];
  double second_weight[kValues];
  bool absent[kValues];
};

// The outputs of a gradient.
enum { kOutStudent, kOutMaskedStudent, kOutSecond, kOutputs };

struct GradientOutputs {
  void* row[kOutputs];  // start of the row, or null; all may alias an input row
  float* squares[kOutputs];  // by vocabulary entry; the squares of what is written are added, unless null
  Element element;
};

// Entries [begin, end) of a row, and the position that is wanted after them, to be fetched meanwhile.
struct Span {
  int64_t row, begin, end, next_row, next_begin;
};

struct DecomposedKLKernels {
  // Add entries [begin, end) of a row to `state`.
  void (*divergences)(const Streams&, Decomposition, int64_t row, int64_t begin, int64_t end, RowState& state);
  // Write the gradient of a span; add <lang, lang>, <lang, vis>, <vis, vis> to `gramian` unless null.
  void (*gradients)(const Streams&, Decomposition, const GradientRow&, const Span&, const GradientOutputs&,
                    double* gramian);
};

// Move the sums of `state` to larger maxima and other anchors. Exact up to rounding: with D = new - old shift or anchor,
// sum e' = exp(-D_base) sum e, and the moment's differences grow by D_anchor - D_base.
static inline void rescale(RowState& state, const double maximum[kStreams], const double anchor[kValues]) {
  const double infinity = __builtin_inf();
  double step[kStreams], factor[kStreams];
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
  for (int c = 0; c < kValues; ++c) moved |= anchor[c] != state.anchor[c];  // equal maxima in two places
  if (!moved) return;
  for (int c = 0; c < kValues; ++c) {
    const int base = kBase[c];
    const double growth = (anchor[c] - state.anchor[c]) - step[base];
    state.moment[c] = factor[base] == 0.0 ? 0.0 : factor[base] * (state.moment[c] + growth * state.sum[base]);
    state.anchor[c] = anchor[c];
  }
  for (int s = 0; s < kStreams; ++s) state.sum[s] *= factor[s];
}

}  // namespace vgs

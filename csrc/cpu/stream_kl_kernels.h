// Kernels of stream_kl for one instruction-set level.
//
// A row is walked in blocks that stay in the first-level cache: every stream is widened, transformed and written to a
// small buffer while the block's maximum is found (one look at memory), then all sums are formed from the buffers while
// the next block is prefetched. Vector sums are in T (float, or double for float64 logits) within a block of kBlock
// entries, and in double beyond it.
//
//   T  accumulation type      Vec  register of T       z[s]  transformed logits of stream s (p, q, r, p0)
//   e  exp(d)                 d    z - shift           block buffers are padded with -inf to whole registers
//   shift, anchor, target q*: see RowState
#pragma once

#include "simd.h"
#include "stream_kl.h"

namespace {
namespace stream_kl {

using namespace vgs::stream_kl;
using vgs::Element;
using vgs::kBFloat16;
using vgs::kElementSize;
using vgs::kFloat16;
using vgs::kFloat64;

constexpr int64_t kBlock = 1024;

template <class T>
struct Block {
  alignas(64) T z[kStreams][kBlock];
  alignas(64) T target[kBlock];  // distances of q*
};

// Widen and transform n entries into `to`, pad to whole registers with -inf, return the maximum.
template <class T, class In>
T load_block(const In* from, int64_t n, const Stream& stream, T* to) {
  using Vec = typename Simd<T>::Vec;
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const T scale = static_cast<T>(stream.scale);
  const T cap_in = static_cast<T>(stream.softcap_in), cap_out = static_cast<T>(stream.softcap_out);
  const T infinity = static_cast<T>(__builtin_inf());
  Vec best = Vec{} - infinity;
  int64_t i = 0;
  if (cap_out == T(0)) {
    for (; i + kLanes <= n; i += kLanes) {
      const Vec z = widen(from + i) * scale;
      store(to + i, z);
      best = maximum(z, best);
    }
  }
  for (; i < n; i += kLanes) {
    const int64_t rest = n - i < kLanes ? n - i : kLanes;
    In padded[kLanes] = {};
    memcpy(padded, from + i, rest * sizeof(In));
    Vec z = widen(padded);
    z = cap_out == T(0) ? z * scale : hyperbolic_tangent(z * cap_in) * cap_out;
    for (int64_t lane = rest; lane < kLanes; ++lane) z[lane] = -infinity;
    store(to + i, z);
    best = maximum(z, best);
  }
  return max_lanes<T>(best);
}

template <class T>
T load_raw_block(const Streams& streams, int s, int64_t row, int64_t begin, int64_t n, T* to) {
  const Stream& stream = streams.stream[s];
  const int64_t offset = row * stream.row_stride + begin;
  if constexpr (sizeof(T) == 8) {
    return load_block(static_cast<const double*>(stream.data) + offset, n, stream, to);
  } else {
    switch (streams.element) {
      case kBFloat16: return load_block(static_cast<const BFloat16*>(stream.data) + offset, n, stream, to);
      case kFloat16: return load_block(static_cast<const Float16*>(stream.data) + offset, n, stream, to);
      default: return load_block(static_cast<const float*>(stream.data) + offset, n, stream, to);
    }
  }
}

// Mix n entries of a teacher with the uniform distribution, pad as before, return the maximum.
template <class T>
T smooth_block(const Stream& stream, int64_t row, int64_t n, T* z) {
  using Vec = typename Simd<T>::Vec;
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const T normalizer = static_cast<const T*>(stream.normalizer)[row * kStatistics];
  const T share = static_cast<T>(stream.share), infinity = static_cast<T>(__builtin_inf());
  Vec best = Vec{} - infinity;
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec mixed = logarithm(exponential(load<Vec>(z + i) - normalizer) + share);
    for (int64_t lane = n - i; lane < kLanes; ++lane) mixed[lane] = -infinity;
    store(z + i, mixed);
    best = maximum(mixed, best);
  }
  return max_lanes<T>(best);
}

template <class T>
T load_block(const Streams& streams, int s, int64_t row, int64_t begin, int64_t n, T* to) {
  const T best = load_raw_block(streams, s, row, begin, n, to);
  const Stream& stream = streams.stream[s];
  return stream.share == 0.0 ? best : smooth_block(stream, row, n, to);
}

// Where the next block of each stream begins, to be fetched while this one is computed.
struct Prefetch {
  const char* from[kStreams];
  int64_t size;

  Prefetch(const Streams& streams, int64_t row, int64_t begin) : size(kElementSize[streams.element]) {
    for (int s = 0; s < kStreams; ++s) {
      const Stream& stream = streams.stream[s];
      from[s] = static_cast<const char*>(stream.data) + (stream.data ? row * stream.row_stride + begin : 0) * size;
    }
  }
  void entry(int s, int64_t i) const { __builtin_prefetch(from[s] + i * size); }
};

// The distance of q* from its anchors. It is -inf where q or p0 has no mass, whatever r has there.
template <class T>
struct TargetDistance {
  using Vec = typename Simd<T>::Vec;
  T q, r, p0, log_ratio, bound, least;
  bool guarded;

  explicit TargetDistance(const Target& target)
      : q(static_cast<T>(target.anchor[0])), r(static_cast<T>(target.anchor[1])), p0(static_cast<T>(target.anchor[2])),
        log_ratio(static_cast<T>(target.log_ratio)), bound(static_cast<T>(target.bound)),
        least(static_cast<T>(target.least)), guarded(target.guarded) {}

  template <bool kGuarded>
  Vec of(Vec zq, Vec zr, Vec z0) const {
    const Vec nowhere = Vec{} - static_cast<T>(__builtin_inf());
    Vec ratio = (z0 - p0) - (zr - r);
    if constexpr (kGuarded) ratio = ratio - log_ratio;
    ratio = z0 == nowhere ? nowhere : ratio;
    if constexpr (kGuarded) {
      const Vec most = Vec{} + bound;
      ratio = ratio > most ? most : ratio < -most ? -most : ratio;
      ratio = zq - q >= Vec{} + least ? ratio : Vec{};
    }
    return zq == nowhere ? nowhere : (zq - q) + ratio;
  }
};

// Form the distances of q* in a block and return the largest; +inf becomes -inf and makes the row improper.
template <class T, bool kGuarded>
T target_block(Block<T>& block, int64_t n, const TargetDistance<T>& distance, bool& improper) {
  using Vec = typename Simd<T>::Vec;
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const Vec infinity = Vec{} + static_cast<T>(__builtin_inf());
  Vec best = -infinity, all = -infinity;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec d = distance.template of<kGuarded>(load<Vec>(block.z[kQ] + i), load<Vec>(block.z[kR] + i),
                                                 load<Vec>(block.z[kP0] + i));
    const Vec finite = d == infinity ? -infinity : d;
    all = maximum(d, all);
    best = maximum(finite, best);
    store(block.target + i, finite);
  }
  improper |= max_lanes<T>(all) == static_cast<T>(__builtin_inf());
  return max_lanes<T>(best);
}

// Sums of one divergence in a block. kCareful leaves out the pairs where the other stream is -inf and notes the largest
// logit among them: whether it carries mass is known only when the row is complete.
template <class T, bool kCareful>
struct Column {
  using Vec = typename Simd<T>::Vec;
  Vec moment = {}, hole = Vec{} - static_cast<T>(__builtin_inf());

  void add(Vec e, Vec d, Vec other, Vec distance) {
    const Vec none = Vec{}, nowhere = none - static_cast<T>(__builtin_inf());
    Vec difference = e == none ? none : d - distance;
    if constexpr (kCareful) {
      const auto is_hole = other == nowhere;
      hole = maximum(is_hole ? d : nowhere, hole);
      difference = is_hole ? none : difference;
    }
    moment += e * difference;
  }
};

enum Third { kNone, kOfR, kOfTarget };

// The sums of one block relative to `shift` and to the anchors of `state`, which are those of this block already.
template <class T, Kind kKind, Third kThirdOf, bool kCareful>
bool block_sums(const Block<T>& block, int64_t n, const T shift[kStreams], const Prefetch& next, RowState& state) {
  using Vec = typename Simd<T>::Vec;
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const Vec none = Vec{};
  Vec sum[kStreams] = {}, target_sum = {};
  Column<T, kCareful> column[kValues];
  T anchor[kAnchors];
  for (int a = 0; a < kAnchors; ++a) anchor[a] = static_cast<T>(state.anchor[a]);
  const T target_shift = state.target_maximum == -__builtin_inf() ? T(0) : static_cast<T>(state.target_maximum);

  for (int64_t i = 0; i < n; i += kLanes) {
    Vec z[kStreams], d[kStreams], e[kStreams];
    for (int s = 0; s < kStreams; ++s) {
      if ((s == kR && kKind == kReverse) || (s == kP0 && kKind != kVisual)) continue;
      next.entry(s, i);
      z[s] = load<Vec>(block.z[s] + i);
      d[s] = z[s] - shift[s];
      e[s] = exponential(d[s]);
      sum[s] += e[s];
    }
    column[kEntropy].moment += e[kP] * (e[kP] == none ? none : d[kP]);
    column[kStandard].add(e[kP], d[kP], z[kQ], z[kQ] - anchor[kQAtP]);
    if constexpr (kThirdOf == kOfR) column[kThird].add(e[kP], d[kP], z[kR], z[kR] - anchor[kRAtP]);
    if constexpr (kThirdOf == kOfTarget) {
      const Vec target = load<Vec>(block.target + i);
      target_sum += exponential(target - target_shift);
      column[kThird].add(e[kP], d[kP], target, target);
    }
    if constexpr (kKind == kVisual) {
      column[kLanguage].add(e[kP0], d[kP0], z[kR], z[kR] - anchor[kRAtP0]);
      column[kDependency].add(e[kQ], d[kQ], z[kR], z[kR] - anchor[kRAtQ]);
    }
  }

  double moments[kValues];
  bool finite = true;
  for (int c = 0; c < kValues; ++c) {
    moments[c] = sum_lanes<T>(column[c].moment);
    finite &= moments[c] - moments[c] == 0.0;
  }
  if (!kCareful && !finite) return false;
  for (int c = 0; c < kValues; ++c) {
    state.moment[c] += moments[c];
    if constexpr (kCareful) {
      const double top = max_lanes<T>(column[c].hole) + static_cast<double>(shift[kBase[c]]);
      if (top > state.hole[c]) state.hole[c] = top;
    }
  }
  for (int s = 0; s < kStreams; ++s) state.sum[s] += sum_lanes<T>(sum[s]);
  state.target_sum += sum_lanes<T>(target_sum);
  return true;
}

// Where the block raises the maximum of a base: anchor the streams that it is compared with at that entry.
template <class T>
void move_anchors(const Block<T>& block, const Streams& streams, int base, T maximum, double anchor[kAnchors]) {
  int64_t i = 0;
  while (block.z[base][i] != maximum) ++i;
  for (int a = 0; a < kAnchors; ++a) {
    if (kAnchoredAt[a] != base || !streams.stream[kAnchored[a]].data) continue;
    const double other = block.z[kAnchored[a]][i];
    anchor[a] = other - other == 0.0 ? other : 0.0;
  }
}

template <class T, Kind kKind, Third kThirdOf>
void row_divergences(const Streams& streams, int64_t row, int64_t begin, int64_t end, RowState& state) {
  Block<T> block;
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t n = end - start < kBlock ? end - start : kBlock;
    double maximum[kStreams], anchor[kAnchors];
    T shift[kStreams];
    for (int s = 0; s < kStreams; ++s) {
      maximum[s] = state.maximum[s];
      if (streams.stream[s].data) {
        const double best = load_block<T>(streams, s, row, start, n, block.z[s]);
        if (best > maximum[s]) maximum[s] = best;
      }
      shift[s] = maximum[s] == -__builtin_inf() ? T(0) : static_cast<T>(maximum[s]);
    }
    for (int a = 0; a < kAnchors; ++a) anchor[a] = state.anchor[a];
    for (int base = 0; base < kStreams; ++base)
      if (maximum[base] > state.maximum[base]) move_anchors(block, streams, base, static_cast<T>(maximum[base]), anchor);
    rescale(state, kKind, maximum, anchor);
    if constexpr (kThirdOf == kOfTarget) {
      // Moved with the anchors it may lie between two numbers of T, which is what the entries are compared with.
      const double moved = state.target_maximum;
      state.target_maximum = static_cast<T>(moved);
      if (state.target_maximum != moved) state.target_sum *= __builtin_exp(moved - state.target_maximum);
      const Target target = {{anchor[kQAtP], anchor[kRAtP], anchor[kP0AtP]}, false, 0.0, 0.0, 0.0};
      raise_target(state, target_block<T, false>(block, n, TargetDistance<T>(target), state.improper));
    }
    const Prefetch next(streams, row, start + kBlock);
    if (!block_sums<T, kKind, kThirdOf, false>(block, n, shift, next, state))
      block_sums<T, kKind, kThirdOf, true>(block, n, shift, next, state);
  }
}

// Call f(T{}) with the accumulation type of the logits.
template <class F>
inline void with_type(Element element, const F& f) {
  if (element == kFloat64) f(double{});
  else f(float{});
}

void divergences(const Streams& streams, bool with_target, int64_t row, int64_t begin, int64_t end, RowState& state) {
  with_type(streams.element, [&](auto type) {
    using T = decltype(type);
    switch (streams.kind) {
      case kReverse: return row_divergences<T, kReverse, kNone>(streams, row, begin, end, state);
      case kPrior: return row_divergences<T, kPrior, kOfR>(streams, row, begin, end, state);
      case kVisual:
        if (with_target) row_divergences<T, kVisual, kOfTarget>(streams, row, begin, end, state);
        else row_divergences<T, kVisual, kNone>(streams, row, begin, end, state);
    }
  });
}

// Add to the sum of q* and to the mean of its distances those of a block. Always careful: it is the rarer way.
template <class T>
void target_sums(const Block<T>& block, int64_t n, RowState& state) {
  using Vec = typename Simd<T>::Vec;
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const T shift = static_cast<T>(state.maximum[kP]);
  const T target_shift = state.target_maximum == -__builtin_inf() ? T(0) : static_cast<T>(state.target_maximum);
  Vec target_sum = {};
  Column<T, true> third;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec d = load<Vec>(block.z[kP] + i) - shift, target = load<Vec>(block.target + i);
    target_sum += exponential(target - target_shift);
    third.add(exponential(d), d, target, target);
  }
  state.moment[kThird] += sum_lanes<T>(third.moment);
  state.target_sum += sum_lanes<T>(target_sum);
  const double top = max_lanes<T>(third.hole) + static_cast<double>(shift);
  if (top > state.hole[kThird]) state.hole[kThird] = top;
}

void target(const Streams& streams, const Target& target, int64_t row, int64_t begin, int64_t end, RowState& state) {
  with_type(streams.element, [&](auto type) {
    using T = decltype(type);
    Block<T> block;
    for (int64_t start = begin; start < end; start += kBlock) {
      const int64_t n = end - start < kBlock ? end - start : kBlock;
      for (int s = 0; s < kStreams; ++s) load_block<T>(streams, s, row, start, n, block.z[s]);
      raise_target(state, target_block<T, true>(block, n, TargetDistance<T>(target), state.improper));
      target_sums(block, n, state);
    }
  });
}

template <class T, class Out>
void store_block(Out* to, const T* from, int64_t n) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) narrow(to + i, load<typename Simd<T>::Vec>(from + i));
  if (i < n) {
    Out padded[kLanes];
    narrow(padded, load<typename Simd<T>::Vec>(from + i));
    memcpy(to + i, padded, (n - i) * sizeof(Out));
  }
}

template <class T>
void store_block(void* row, Element element, int64_t begin, const T* from, int64_t n) {
  switch (element) {
    case kBFloat16: return store_block(static_cast<BFloat16*>(row) + begin, from, n);
    case kFloat16: return store_block(static_cast<Float16*>(row) + begin, from, n);
    case kFloat64: return store_block(static_cast<double*>(row) + begin, from, n);
    default: return store_block(static_cast<float*>(row) + begin, from, n);
  }
}

template <class T>
void add_squares(const T* from, int64_t n, float* squares) {
  int64_t i = 0;
  if constexpr (sizeof(T) == sizeof(float))
    for (constexpr int64_t kLanes = Simd<float>::kLanes; i + kLanes <= n; i += kLanes) {
      const FloatVec x = load<FloatVec>(from + i);
      store(squares + i, load<FloatVec>(squares + i) + x * x);
    }
  for (; i < n; ++i) squares[i] += static_cast<float>(from[i] * from[i]);
}

template <class T>
constexpr T kSmallest = sizeof(T) == 4 ? static_cast<T>(__FLT_MIN__) : static_cast<T>(__DBL_MIN__);  // that counts as mass

// d objective / d logit = p * sum_c weight[c] (difference[c] - mean[c]) * d z / d logit, where p = exp(z_p - maximum) / sum
// and the difference is that of RowState. Every stream of a position is read before anything is written to it, which is
// what makes the outputs safe over the inputs.
template <class T, Third kThirdOf, bool kGuarded, bool kSecond>
void row_gradients(const Streams& streams, const GradientRow& g, const Span& span, const GradientOutputs& out) {
  using Vec = typename Simd<T>::Vec;
  constexpr int64_t kLanes = Simd<T>::kLanes;
  constexpr int kUsed = kThirdOf == kOfTarget ? kStreams : kThirdOf == kOfR ? kR + 1 : kQ + 1;
  const Vec none = Vec{};
  Block<T> block;
  const T maximum = static_cast<T>(g.maximum), inverse_sum = static_cast<T>(g.inverse_sum);
  T mean[kCoefficients], weight[2][kCoefficients];
  for (int c = 0; c < kCoefficients; ++c) {
    mean[c] = static_cast<T>(g.mean[c]);
    for (int i = 0; i < 2; ++i) weight[i][c] = static_cast<T>(g.weight[i][c]);
  }
  // Where the teacher does not matter p is compared with itself: 0, whatever the teacher holds.
  const int other = g.uses_standard ? kQ : kP;
  const T anchor = g.uses_standard ? static_cast<T>(g.target.anchor[0]) : maximum;
  const T prior_anchor = static_cast<T>(g.target.anchor[1]);
  const TargetDistance<T> target(g.target);
  const Stream& student = streams.stream[kP];
  // d z / d x = slope (1 - (z / cap)^2); the second factor is 1 without a cap.
  const bool capped = student.softcap_out != 0.0;
  const T slope = static_cast<T>(capped ? student.softcap_in * student.softcap_out : student.scale);
  const T inverse_cap = static_cast<T>(capped ? 1.0 / student.softcap_out : 0.0);

  for (int64_t start = span.begin; start < span.end; start += kBlock) {
    const bool last = span.end - start <= kBlock;
    const int64_t n = last ? span.end - start : kBlock;
    for (int s = 0; s < kUsed; ++s) load_block<T>(streams, s, span.row, start, n, block.z[s]);
    const Prefetch next(streams, last ? span.next_row : span.row, last ? span.next_begin : start + kBlock);
    for (int64_t i = 0; i < n; i += kLanes) {
      for (int s = 0; s < kUsed; ++s) next.entry(s, i);
      const Vec z = load<Vec>(block.z[kP] + i), ratio = z * inverse_cap;
      const Vec d = z - maximum, p = exponential(d) * inverse_sum;
      const Vec mass = p * (slope - slope * (ratio * ratio));
      const auto carries = p >= none + kSmallest<T>;
      const Vec entropy = mean[kEntropy] - d;
      const Vec standard = (d - (load<Vec>(block.z[other] + i) - anchor)) - mean[kStandard];
      Vec third = none;
      if constexpr (kThirdOf == kOfR) third = (d - (load<Vec>(block.z[kR] + i) - prior_anchor)) - mean[kThird];
      if constexpr (kThirdOf == kOfTarget)
        third = (d - target.template of<kGuarded>(load<Vec>(block.z[kQ] + i), load<Vec>(block.z[kR] + i),
                                                  load<Vec>(block.z[kP0] + i))) - mean[kThird];
      const auto objective = [&](int k) {
        Vec total = weight[k][kEntropy] * entropy + weight[k][kStandard] * standard;
        if constexpr (kThirdOf != kNone) total += weight[k][kThird] * third;
        return carries ? mass * total : none;
      };
      if constexpr (kSecond) store(block.target + i, objective(1));
      store(block.z[kP] + i, objective(0));
    }
    const auto write = [&](int output, const T* values) {
      store_block(out.row[output], out.element, start, values, n);
      if (out.squares[output]) add_squares(values, n, out.squares[output] + start);
    };
    write(0, block.z[kP]);
    if constexpr (kSecond) write(1, block.target);
  }
}

template <class T, bool kSecond>
void gradients_of(const Streams& streams, const GradientRow& g, const Span& span, const GradientOutputs& out) {
  if (!g.uses_third) return row_gradients<T, kNone, false, kSecond>(streams, g, span, out);
  if (streams.kind == kPrior) return row_gradients<T, kOfR, false, kSecond>(streams, g, span, out);
  if (g.target.guarded) return row_gradients<T, kOfTarget, true, kSecond>(streams, g, span, out);
  row_gradients<T, kOfTarget, false, kSecond>(streams, g, span, out);
}

void gradients(const Streams& streams, const GradientRow& g, const Span& span, const GradientOutputs& out) {
  with_type(streams.element, [&](auto type) {
    using T = decltype(type);
    if (out.row[1]) gradients_of<T, true>(streams, g, span, out);
    else gradients_of<T, false>(streams, g, span, out);
  });
}

}  // namespace stream_kl

constexpr vgs::StreamKLKernels kStreamKL = {stream_kl::divergences, stream_kl::target, stream_kl::gradients};

}  // namespace

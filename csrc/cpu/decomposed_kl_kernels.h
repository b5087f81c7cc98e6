// Kernels of decomposed_kl for one instruction-set level.
//
// A row is walked in blocks that stay in the first-level cache: every stream is widened, transformed and written to a
// small buffer while the block's maximum is found (one look at memory), then all sums are formed from the buffers while
// the next block is prefetched. Vector sums are in T (float, or double for float64 logits) within a block of kBlock
// entries, and in double beyond it.
//
//   T  accumulation type      Vec  register of T       z[s]  transformed logits of stream s (p, q, r, p0)
//   e  exp(d)                 d    z - shift           block buffers are padded with -inf to whole registers
//   shift, anchor: see RowState
#pragma once

#include "decomposed_kl.h"
#include "simd.h"

namespace {
namespace decomposed_kl {

using namespace vgs;

constexpr int64_t kBlock = 2048;

template <class T>
struct Block {
  alignas(64) T z[kStreams][kBlock];
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
T load_block(const Streams& streams, int s, int64_t row, int64_t begin, int64_t n, T* to) {
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

// The sums of one block relative to `shift`. kCareful leaves out the pairs where the other stream is -inf and notes the
// largest logit among them: whether it carries mass is known only when the row is complete.
template <class T, bool kUsesPrior, bool kUsesMasked, bool kCareful>
bool block_sums(const Block<T>& block, int64_t n, const T shift[kStreams], const Prefetch& next, RowState& state) {
  // (shift and the anchors of `state` are those of this block already)
  using Vec = typename Simd<T>::Vec;
  constexpr int64_t kLanes = Simd<T>::kLanes;
  constexpr bool kUsesShift = kUsesPrior && kUsesMasked;
  const T infinity = static_cast<T>(__builtin_inf());
  const Vec none = Vec{};
  Vec sum[kStreams] = {}, moment[kValues] = {};
  T anchor[kValues];
  for (int c = 0; c < kValues; ++c) anchor[c] = static_cast<T>(state.anchor[c]);
  Vec hole[kValues];
  if constexpr (kCareful)
    for (Vec& h : hole) h = none - infinity;

  for (int64_t i = 0; i < n; i += kLanes) {
    Vec z[kStreams], d[kStreams], e[kStreams];
    for (int s = 0; s < kStreams; ++s) {
      if (s == kP0 && !kUsesMasked) continue;
      next.entry(s, i);
      z[s] = load<Vec>(block.z[s] + i);
      d[s] = z[s] - shift[s];
      e[s] = exponential(d[s]);
      sum[s] += e[s];
    }
    const auto add = [&](int column) {
      const int base = kBase[column], other = kOther[column];
      Vec difference = e[base] == none ? none : d[base] - (z[other] - anchor[column]);
      if constexpr (kCareful) {
        const auto is_hole = z[other] == -infinity;
        hole[column] = maximum(is_hole ? d[base] : none - infinity, hole[column]);
        difference = is_hole ? none : difference;
      }
      moment[column] += e[base] * difference;
    };
    moment[kEntropy] += e[kP] * (e[kP] == none ? none : d[kP]);
    add(kFull);
    if constexpr (kUsesPrior) add(kPrior);
    if constexpr (kUsesShift) add(kShift);
    if constexpr (kUsesMasked) add(kMasked);
  }

  double moments[kValues];
  bool finite = true;
  for (int c = 0; c < kValues; ++c) {
    moments[c] = sum_lanes<T>(moment[c]);
    finite &= moments[c] - moments[c] == 0.0;
  }
  if (!kCareful && !finite) return false;
  for (int c = 0; c < kValues; ++c) {
    state.moment[c] += moments[c];
    if constexpr (kCareful) {
      const double top = max_lanes<T>(hole[c]) + static_cast<double>(shift[kBase[c]]);
      if (top > state.hole[c]) state.hole[c] = top;
    }
  }
  for (int s = 0; s < kStreams; ++s) state.sum[s] += sum_lanes<T>(sum[s]);
  return true;
}

// Where the block raises the maximum of a base stream: anchor its columns at that entry.
template <class T>
void move_anchors(const Block<T>& block, const Streams& streams, int base, T maximum, double anchor[kValues]) {
  int64_t i = 0;
  while (block.z[base][i] != maximum) ++i;
  for (int c = kFull; c < kValues; ++c) {
    if (kBase[c] != base || !streams.stream[kOther[c]].data) continue;
    const double other = block.z[kOther[c]][i];
    anchor[c] = other - other == 0.0 ? other : 0.0;
  }
}

template <class T, bool kUsesPrior, bool kUsesMasked>
void row_divergences(const Streams& streams, int64_t row, int64_t begin, int64_t end, RowState& state) {
  Block<T> block;
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t n = end - start < kBlock ? end - start : kBlock;
    double maximum[kStreams], anchor[kValues];
    T shift[kStreams];
    for (int s = 0; s < kStreams; ++s) {
      maximum[s] = state.maximum[s];
      if (streams.stream[s].data) {
        const double best = load_block<T>(streams, s, row, start, n, block.z[s]);
        if (best > maximum[s]) maximum[s] = best;
      }
      shift[s] = maximum[s] == -__builtin_inf() ? T(0) : static_cast<T>(maximum[s]);
    }
    for (int c = 0; c < kValues; ++c) anchor[c] = state.anchor[c];
    for (int base = kP; base <= kP0; base += kP0 - kP)
      if (maximum[base] > state.maximum[base]) move_anchors(block, streams, base, static_cast<T>(maximum[base]), anchor);
    rescale(state, maximum, anchor);
    const Prefetch next(streams, row, start + kBlock);
    if (!block_sums<T, kUsesPrior, kUsesMasked, false>(block, n, shift, next, state))
      block_sums<T, kUsesPrior, kUsesMasked, true>(block, n, shift, next, state);
  }
}

template <class T>
void divergences_of(const Streams& streams, Decomposition decomposition, int64_t row, int64_t begin, int64_t end,
                    RowState& state) {
  switch (decomposition) {
    case kTeacherPrior: return row_divergences<T, true, false>(streams, row, begin, end, state);
    case kBayes: return row_divergences<T, true, true>(streams, row, begin, end, state);
    default: return row_divergences<T, false, true>(streams, row, begin, end, state);
  }
}

void divergences(const Streams& streams, Decomposition decomposition, int64_t row, int64_t begin, int64_t end,
                 RowState& state) {
  if (streams.element == kFloat64) return divergences_of<double>(streams, decomposition, row, begin, end, state);
  divergences_of<float>(streams, decomposition, row, begin, end, state);
}

// d objective / d logit = p * sum_c weight[c] (difference[c] - mean[c]) * d z / d logit, where p = exp(z_p - maximum) / sum
// and the difference is that of RowState. Every stream of a position is
// read before anything is written to it, which is what makes the outputs safe over the inputs.
template <class T, bool kUsesPrior, bool kUsesMasked, bool kSecond, bool kGramian>
void row_gradients(const Streams& streams, const GradientRow& g, const Span& span, const GradientOutputs& out,
                   double* gramian) {
  using Vec = typename Simd<T>::Vec;
  constexpr int64_t kLanes = Simd<T>::kLanes;
  constexpr bool kUsesShift = kUsesPrior && kUsesMasked;
  const Vec none = Vec{};
  Block<T> block;
  const T maximum = static_cast<T>(g.maximum[kP]), inverse_sum = static_cast<T>(g.inverse_sum[kP]);
  const T maximum0 = static_cast<T>(g.maximum[kP0]), inverse_sum0 = static_cast<T>(g.inverse_sum[kP0]);
  T mean[kValues], weight[kValues], second[kValues];
  for (int c = 0; c < kValues; ++c) {
    mean[c] = static_cast<T>(g.mean[c]);
    weight[c] = static_cast<T>(g.weight[c]);
    second[c] = static_cast<T>(g.second_weight[c]);
  }
  // An absent column compares its base with itself: 0 on the support, whatever the other stream holds.
  int other[kValues];
  T anchor[kValues];
  for (int c = kFull; c < kValues; ++c) {
    other[c] = g.absent[c] ? kBase[c] : kOther[c];
    anchor[c] = static_cast<T>(g.absent[c] ? g.maximum[kBase[c]] : g.anchor[c]);
  }
  const Stream& student = streams.stream[kP];
  // d z / d x = slope (1 - (z / cap)^2); the second factor is 1 without a cap.
  const bool capped = student.softcap_out != 0.0;
  const T slope = static_cast<T>(capped ? student.softcap_in * student.softcap_out : student.scale);
  const T inverse_cap = static_cast<T>(capped ? 1.0 / student.softcap_out : 0.0);
  const auto chain = [&](Vec z) {
    const Vec ratio = z * inverse_cap;
    return slope - slope * (ratio * ratio);
  };

  for (int64_t start = span.begin; start < span.end; start += kBlock) {
    const bool last = span.end - start <= kBlock;
    const int64_t n = last ? span.end - start : kBlock;
    for (int s = 0; s < kStreams; ++s)
      if (streams.stream[s].data) load_block<T>(streams, s, span.row, start, n, block.z[s]);
    const Prefetch next(streams, last ? span.next_row : span.row, last ? span.next_begin : start + kBlock);
    Vec lang_lang = none, lang_vis = none, vis_vis = none;
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec z = load<Vec>(block.z[kP] + i);
      const auto from_anchor = [&](int c) { return load<Vec>(block.z[other[c]] + i) - anchor[c]; };
      const Vec d = z - maximum;
      const Vec p = exponential(d) * inverse_sum;
      const auto carries = p > none;
      const Vec mass = p * chain(z);
      next.entry(kP, i), next.entry(kQ, i), next.entry(kR, i);
      const Vec entropy = mean[kEntropy] - d;
      const Vec full = (d - from_anchor(kFull)) - mean[kFull];
      Vec total = weight[kEntropy] * entropy + weight[kFull] * full;
      Vec second_total = second[kEntropy] * entropy + second[kFull] * full;
      Vec prior = none, shift = none, masked_from_anchor = none;
      if constexpr (kUsesMasked) masked_from_anchor = from_anchor(kMasked);
      if constexpr (kUsesPrior) {
        prior = (d - from_anchor(kPrior)) - mean[kPrior];
        total += weight[kPrior] * prior;
        second_total += second[kPrior] * prior;
      }
      if constexpr (kUsesShift) {
        shift = (d - from_anchor(kShift)) - mean[kShift];
        total += weight[kShift] * shift;
      }
      store(block.z[kP] + i, carries ? mass * total : none);
      if constexpr (kSecond) store(block.z[kR] + i, carries ? mass * second_total : none);
      if constexpr (kGramian) {
        const Vec vis = carries ? mass * (kUsesPrior ? full - prior + shift : full) : none;
        vis_vis += vis * vis;
        if constexpr (!kUsesMasked) {
          const Vec lang = carries ? mass * prior : none;
          lang_lang += lang * lang;
          lang_vis += lang * vis;
        }
      }
      if constexpr (kUsesMasked) {
        const Vec z0 = load<Vec>(block.z[kP0] + i);
        next.entry(kP0, i);
        const Vec d0 = z0 - maximum0;
        const Vec mass0 = exponential(d0) * inverse_sum0;
        const Vec masked = (d0 - masked_from_anchor) - mean[kMasked];
        const Vec lang = mass0 > none ? mass0 * chain(z0) * masked : none;
        store(block.z[kP0] + i, mass0 > none ? lang * weight[kMasked] : none);
        if constexpr (kGramian) lang_lang += lang * lang;
      }
    }
    const auto write = [&](int output, const T* values) {
      if (out.row[output]) store_block(out.row[output], out.element, start, values, n);
      if (out.squares[output]) add_squares(values, n, out.squares[output] + start);
    };
    write(kOutStudent, block.z[kP]);
    if constexpr (kSecond) write(kOutSecond, block.z[kR]);
    if constexpr (kUsesMasked) write(kOutMaskedStudent, block.z[kP0]);
    if constexpr (kGramian) {
      gramian[0] += sum_lanes<T>(lang_lang);
      gramian[1] += sum_lanes<T>(lang_vis);
      gramian[2] += sum_lanes<T>(vis_vis);
    }
  }
}

template <class T, bool kUsesPrior, bool kUsesMasked>
void gradients_of(const Streams& streams, const GradientRow& g, const Span& span, const GradientOutputs& out,
                  double* gramian) {
  if (out.row[kOutSecond]) {
    if (gramian) row_gradients<T, kUsesPrior, kUsesMasked, true, true>(streams, g, span, out, gramian);
    else row_gradients<T, kUsesPrior, kUsesMasked, true, false>(streams, g, span, out, gramian);
  } else {
    if (gramian) row_gradients<T, kUsesPrior, kUsesMasked, false, true>(streams, g, span, out, gramian);
    else row_gradients<T, kUsesPrior, kUsesMasked, false, false>(streams, g, span, out, gramian);
  }
}

template <class T>
void gradients_of(const Streams& streams, Decomposition decomposition, const GradientRow& g, const Span& span,
                  const GradientOutputs& out, double* gramian) {
  switch (decomposition) {
    case kTeacherPrior: return gradients_of<T, true, false>(streams, g, span, out, gramian);
    case kBayes: return gradients_of<T, true, true>(streams, g, span, out, gramian);
    default: return gradients_of<T, false, true>(streams, g, span, out, gramian);
  }
}

void gradients(const Streams& streams, Decomposition decomposition, const GradientRow& g, const Span& span,
               const GradientOutputs& out, double* gramian) {
  if (streams.element == kFloat64)
    return gradients_of<double>(streams, decomposition, g, span, out, gramian);
  gradients_of<float>(streams, decomposition, g, span, out, gramian);
}

}  // namespace decomposed_kl

constexpr vgs::DecomposedKLKernels kDecomposedKL = {decomposed_kl::divergences, decomposed_kl::gradients};

}  // namespace

// Kernels of gradient_gramian for one instruction-set level.
//
//   T  accumulation type (float, or double when a gradient is float64)     Vec  register of T     a, b  lang, vis
//
// Sums are in lanes of T within a block of kBlock entries and in double beyond it, so that the error does not grow with
// the length of the gradient.
#pragma once

#include "gradient_gramian.h"
#include "gradient_block.h"

namespace {
namespace gradients {

// kUnroll independent sums: a fused multiply-add takes four cycles and two start in each.
template <class T, class In>
void block_products(const In* a, const In* b, int64_t n, double sums[3]) {
  using Vec = typename Simd<T>::Vec;
  constexpr int64_t kLanes = Simd<T>::kLanes, kUnroll = 4;
  Vec aa[kUnroll] = {}, ab[kUnroll] = {}, bb[kUnroll] = {};
  const auto add = [&](int64_t k, const In* x, const In* y) {
    const Vec u = widen(x), v = widen(y);
    aa[k] += u * u;
    ab[k] += u * v;
    bb[k] += v * v;
  };
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < kUnroll; ++k) {
      __builtin_prefetch(reinterpret_cast<const char*>(a + i + k * kLanes) + kPrefetchBytes);
      __builtin_prefetch(reinterpret_cast<const char*>(b + i + k * kLanes) + kPrefetchBytes);
      add(k, a + i + k * kLanes, b + i + k * kLanes);
    }
  }
  for (; i < n; i += kLanes) {
    const int64_t rest = n - i < kLanes ? n - i : kLanes;
    In x[kLanes] = {}, y[kLanes] = {};
    memcpy(x, a + i, rest * sizeof(In));
    memcpy(y, b + i, rest * sizeof(In));
    add(0, x, y);
  }
  sums[0] += sum_lanes<T>((aa[0] + aa[1]) + (aa[2] + aa[3]));
  sums[1] += sum_lanes<T>((ab[0] + ab[1]) + (ab[2] + ab[3]));
  sums[2] += sum_lanes<T>((bb[0] + bb[1]) + (bb[2] + bb[3]));
}

template <class T, class In>
void products(const In* a, const In* b, int64_t n, double sums[3]) {
  for (int64_t i = 0; i < n; i += kBlock) block_products<T>(a + i, b + i, n - i < kBlock ? n - i : kBlock, sums);
}

// Dtypes that differ meet in a buffer of T that stays in the first-level cache.
template <class T>
void mixed_products(const void* a, Element a_element, const void* b, Element b_element, int64_t n, double sums[3]) {
  alignas(64) T x[kBlock], y[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    widen_block(a, a_element, i, m, x);
    widen_block(b, b_element, i, m, y);
    block_products<T>(x, y, m, sums);
  }
}

void add_products(const void* lang, Element lang_element, const void* vis, Element vis_element, int64_t n,
                  bool is_double, double sums[3]) {
  if (lang_element == vis_element && is_double == (lang_element == kFloat64)) {
    switch (lang_element) {
      case kFloat32: return products<float>(static_cast<const float*>(lang), static_cast<const float*>(vis), n, sums);
      case kFloat64: return products<double>(static_cast<const double*>(lang), static_cast<const double*>(vis), n, sums);
      case kBFloat16:
        return products<float>(static_cast<const BFloat16*>(lang), static_cast<const BFloat16*>(vis), n, sums);
      case kFloat16:
        return products<float>(static_cast<const Float16*>(lang), static_cast<const Float16*>(vis), n, sums);
    }
  }
  if (is_double) return mixed_products<double>(lang, lang_element, vis, vis_element, n, sums);
  mixed_products<float>(lang, lang_element, vis, vis_element, n, sums);
}

}  // namespace gradients

constexpr vgs::GramianKernels kGramian = {gradients::add_products};

}  // namespace

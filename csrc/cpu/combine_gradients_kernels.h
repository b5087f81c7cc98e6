// Kernels of combine_gradients for one instruction-set level.
//
//   T  arithmetic type (the dtype of the weights)     Vec  register of T     a, b  lang, vis     u, v  their weights
#pragma once

#include "combine_gradients.h"
#include "gradient_block.h"

namespace {
namespace gradients {

// `to` may be a or b: every entry is read before it is written. kAround writes around the caches, which spares reading
// the lines of `to` first: three streams of memory traffic instead of four. In place those lines have just been read.
template <class T, bool kBoth, bool kAround, class In>
void weighted_sum(const In* a, T u, const In* b, T v, In* to, int64_t n) {
  using Vec = typename Simd<T>::Vec;
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const auto combined = [&](const In* x, const In* y) -> Vec {
    if constexpr (kBoth) return widen(x) * u + widen(y) * v;
    return widen(x) * u;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    __builtin_prefetch(reinterpret_cast<const char*>(a + i) + kPrefetchBytes);
    if constexpr (kBoth) __builtin_prefetch(reinterpret_cast<const char*>(b + i) + kPrefetchBytes);
    if constexpr (kAround) narrow_around_caches(to + i, combined(a + i, b + i));
    else narrow(to + i, combined(a + i, b + i));
  }
  if constexpr (kAround) fence_writes_around_caches();
  if (i == n) return;
  const int64_t rest = n - i;
  In x[kLanes] = {}, y[kLanes] = {}, z[kLanes];
  memcpy(x, a + i, rest * sizeof(In));
  if constexpr (kBoth) memcpy(y, b + i, rest * sizeof(In));
  narrow(z, combined(x, y));
  memcpy(to + i, z, rest * sizeof(In));
}

template <class T, class In>
void combine_alike(const void* a, T u, const void* b, T v, void* out, int64_t n, bool streaming) {
  const In *x = static_cast<const In*>(a), *y = static_cast<const In*>(b);
  In* to = static_cast<In*>(out);
  const bool around = streaming && to != x && to != y && reinterpret_cast<uintptr_t>(to) % kRegisterBytes == 0;
  if (x && y) return around ? weighted_sum<T, true, true>(x, u, y, v, to, n) : weighted_sum<T, true, false>(x, u, y, v, to, n);
  if (!x) x = y, u = v;
  around ? weighted_sum<T, false, true>(x, u, x, v, to, n) : weighted_sum<T, false, false>(x, u, x, v, to, n);
}

// Dtypes that differ meet in a buffer of T that stays in the first-level cache.
template <class T>
void combine_mixed(const void* a, Element a_element, T u, const void* b, Element b_element, T v, void* to,
                   Element to_element, int64_t n) {
  alignas(64) T x[kBlock], y[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    if (a) widen_block(a, a_element, i, m, x);
    if (b) widen_block(b, b_element, i, m, y);
    combine_alike<T, T>(a ? x : nullptr, u, b ? y : nullptr, v, x, m, false);
    narrow_block(x, m, to, to_element, i);
  }
}

void combine(const void* lang, Element lang_element, double lang_weight, const void* vis, Element vis_element,
             double vis_weight, void* out, Element out_element, int64_t n, bool is_double, bool streaming) {
  const bool alike = (!lang || lang_element == out_element) && (!vis || vis_element == out_element);
  const float u = static_cast<float>(lang_weight), v = static_cast<float>(vis_weight);
  if (alike && is_double == (out_element == kFloat64)) {
    switch (out_element) {
      case kFloat32: return combine_alike<float, float>(lang, u, vis, v, out, n, streaming);
      case kBFloat16: return combine_alike<float, BFloat16>(lang, u, vis, v, out, n, streaming);
      case kFloat16: return combine_alike<float, Float16>(lang, u, vis, v, out, n, streaming);
      case kFloat64: return combine_alike<double, double>(lang, lang_weight, vis, vis_weight, out, n, streaming);
    }
  }
  if (is_double)
    return combine_mixed<double>(lang, lang_element, lang_weight, vis, vis_element, vis_weight, out, out_element, n);
  combine_mixed<float>(lang, lang_element, u, vis, vis_element, v, out, out_element, n);
}

}  // namespace gradients

constexpr vgs::CombineKernels kCombine = {gradients::combine};

}  // namespace

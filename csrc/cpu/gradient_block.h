// Blocks of gradient entries in the accumulation type, for the kernels of gradient_gramian and combine_gradients.
// Internal linkage throughout, as in simd.h.
#pragma once

#include "element.h"
#include "simd.h"

namespace {
namespace gradients {

using namespace vgs;

constexpr int64_t kBlock = 4096;  // entries; two buffers of float fill half of a first-level cache or less

// How far ahead of use a line is asked for. Hardware prefetchers stop at a page's end, every 4096 bytes.
constexpr int64_t kPrefetchBytes = 2048;

template <class In>
void widen_entries(const In* from, int64_t n, float* to) {
  constexpr int64_t kLanes = Simd<float>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, widen(from + i));
  if (i == n) return;
  In padded[kLanes] = {};
  memcpy(padded, from + i, (n - i) * sizeof(In));
  const FloatVec last = widen(padded);
  memcpy(to + i, &last, (n - i) * sizeof(float));
}

void widen_block(const void* from, Element element, int64_t offset, int64_t n, float* to) {
  switch (element) {
    case kBFloat16: return widen_entries(static_cast<const BFloat16*>(from) + offset, n, to);
    case kFloat16: return widen_entries(static_cast<const Float16*>(from) + offset, n, to);
    case kFloat32: return widen_entries(static_cast<const float*>(from) + offset, n, to);
    case kFloat64:
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(static_cast<const double*>(from)[offset + i]);
  }
}

void widen_block(const void* from, Element element, int64_t offset, int64_t n, double* to) {
  if (element == kFloat64) {
    memcpy(to, static_cast<const double*>(from) + offset, n * sizeof(double));
    return;
  }
  alignas(64) float wide[kBlock];
  widen_block(from, element, offset, n, wide);
  for (int64_t i = 0; i < n; ++i) to[i] = wide[i];
}

template <class T, class Out>
void narrow_entries(const T* from, int64_t n, Out* to) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) narrow(to + i, load<typename Simd<T>::Vec>(from + i));
  if (i == n) return;
  T padded[kLanes] = {};
  memcpy(padded, from + i, (n - i) * sizeof(T));
  Out last[kLanes];
  narrow(last, load<typename Simd<T>::Vec>(padded));
  memcpy(to + i, last, (n - i) * sizeof(Out));
}

template <class T>
void narrow_block(const T* from, int64_t n, void* to, Element element, int64_t offset) {
  switch (element) {
    case kBFloat16: return narrow_entries(from, n, static_cast<BFloat16*>(to) + offset);
    case kFloat16: return narrow_entries(from, n, static_cast<Float16*>(to) + offset);
    case kFloat32: return narrow_entries(from, n, static_cast<float*>(to) + offset);
    case kFloat64: return narrow_entries(from, n, static_cast<double*>(to) + offset);
  }
}

}  // namespace gradients
}  // namespace

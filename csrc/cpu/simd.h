// Vectors of one register of the instruction set this file is compiled for, in GCC/Clang vector extensions: the same
// source gives SSE2, AVX2, AVX-512 or NEON. Everything has internal linkage (see kernels.h for why).
//
// Simd<T>: T float or double; Vec a register of T; kLanes entries.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kRegisterBytes)));
  typedef int32_t Bits __attribute__((vector_size(kRegisterBytes)));
  typedef uint32_t Unsigned __attribute__((vector_size(kRegisterBytes)));
  typedef uint16_t Half __attribute__((vector_size(kRegisterBytes / 2)));
  static constexpr int kLanes = kRegisterBytes / 4;
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kRegisterBytes)));
  static constexpr int kLanes = kRegisterBytes / 8;
};

using FloatVec = Simd<float>::Vec;
using DoubleVec = Simd<double>::Vec;

template <class Vec, class T>
inline Vec load(const T* from) {
  Vec v;
  memcpy(&v, from, sizeof(v));
  return v;
}

template <class Vec, class T>
inline void store(T* to, const Vec& v) {
  memcpy(to, &v, sizeof(v));
}

template <class Vec>
inline Vec maximum(Vec a, Vec b) {
  return a > b ? a : b;
}

template <class T>
inline double sum_lanes(typename Simd<T>::Vec v) {
  double total = 0.0;
  for (int i = 0; i < Simd<T>::kLanes; ++i) total += v[i];
  return total;
}

template <class T>
inline T max_lanes(typename Simd<T>::Vec v) {
  T best = v[0];
  for (int i = 1; i < Simd<T>::kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// exp(x) for x <= 88, to about 1 ulp; 0 below the smallest normal number, NaN stays NaN.
// x = n ln 2 + r with |r| <= ln(2) / 2; exp(r) is the Taylor-minimax polynomial of degree 6, and n is added to the
// exponent field. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits. ln 2 is split so that
// n * kLn2High is exact without a fused multiply-add.
inline FloatVec exponential(FloatVec x) {
  constexpr float kLog2E = 1.44269504088896341f, kMagic = 12582912.0f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kSmallest = -87.3365402f;
  const FloatVec shifted = x * kLog2E + kMagic;
  const FloatVec n = shifted - kMagic;
  FloatVec r = x - n * kLn2High;
  r = r - n * kLn2Low;
  FloatVec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r;
  p = p + 1.0f;
  const Simd<float>::Unsigned exponent = (Simd<float>::Unsigned)shifted << 23;
  const FloatVec result = (FloatVec)((Simd<float>::Unsigned)p + exponent);
  return x < kSmallest ? FloatVec{} : result;
}

inline DoubleVec exponential(DoubleVec x) {
  for (int i = 0; i < Simd<double>::kLanes; ++i) x[i] = exp(x[i]);
  return x;
}

// log(x) for normal x > 0, to about 1 ulp; NaN stays NaN. x = 2^n (1 + r) with 1 + r in [sqrt(1/2), sqrt(2)).
inline FloatVec logarithm(FloatVec x) {
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  using Bits = Simd<float>::Unsigned;
  const Bits biased = ((Bits)x - 0x3f3504f3u + 0x3f800000u) >> 23;
  const FloatVec n = __builtin_convertvector(biased, FloatVec) - 127.0f;
  const FloatVec r = (FloatVec)((Bits)x - ((biased - 127u) << 23)) - 1.0f;
  FloatVec p = r * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const FloatVec square = r * r;
  p = p * r * square + n * kLn2Low - square * 0.5f;
  const FloatVec result = (r + p) + n * kLn2High;
  return x == x ? result : x;
}

inline DoubleVec logarithm(DoubleVec x) {
  for (int i = 0; i < Simd<double>::kLanes; ++i) x[i] = log(x[i]);
  return x;
}

// tanh(x): an odd polynomial below 0.625, 1 - 2 / (exp(2x) + 1) above.
inline FloatVec hyperbolic_tangent(FloatVec x) {
  const FloatVec size = x < 0.0f ? -x : x;
  const FloatVec doubled = size + size;
  const FloatVec e = exponential(doubled < 40.0f ? doubled : FloatVec{} + 40.0f);
  const FloatVec large = 1.0f - 2.0f / (e + 1.0f);
  const FloatVec square = x * x;
  FloatVec p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const FloatVec small = p * square * x + x;
  // Written so that NaN, for which every comparison is false, takes the polynomial.
  return size >= 0.625f ? (x < 0.0f ? -large : large) : small;
}

inline DoubleVec hyperbolic_tangent(DoubleVec x) {
  for (int i = 0; i < Simd<double>::kLanes; ++i) x[i] = tanh(x[i]);
  return x;
}

// Storage types. `widen` reads one register's worth of entries, `narrow` writes it, rounding to nearest even.
struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline FloatVec widen(const float* from) { return load<FloatVec>(from); }
inline DoubleVec widen(const double* from) { return load<DoubleVec>(from); }
inline FloatVec widen(const BFloat16* from) {
  const auto half = load<Simd<float>::Half>(from);
  return (FloatVec)(__builtin_convertvector(half, Simd<float>::Unsigned) << 16);
}

inline void narrow(float* to, FloatVec v) { store(to, v); }
inline void narrow(double* to, DoubleVec v) { store(to, v); }
#if defined(__AVX512BF16__)
inline void narrow(BFloat16* to, FloatVec v) { store(to, _mm512_cvtneps_pbh((__m512)v)); }
#else
inline void narrow(BFloat16* to, FloatVec v) {
  const auto bits = (Simd<float>::Unsigned)v;
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto chosen = v == v ? rounded : Simd<float>::Unsigned{} + 0x7fc0u;
  store(to, __builtin_convertvector(chosen, Simd<float>::Half));
}
#endif
inline void narrow(double* to, FloatVec v) {
  for (int i = 0; i < Simd<float>::kLanes; ++i) to[i] = v[i];
}
inline void narrow(float* to, DoubleVec v) {
  for (int i = 0; i < Simd<double>::kLanes; ++i) to[i] = static_cast<float>(v[i]);
}

#if defined(__AVX512F__)
inline FloatVec widen(const Float16* from) { return (FloatVec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
inline void narrow(Float16* to, FloatVec v) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__) && defined(__AVX2__)
inline FloatVec widen(const Float16* from) { return (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
inline void narrow(Float16* to, FloatVec v) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline float widen_one(Float16 half) {
  const uint32_t sign = (uint32_t)(half.bits & 0x8000u) << 16, rest = half.bits & 0x7fffu;
  float value;
  if (rest < 0x0400u) {  // zero and subnormal numbers are multiples of 2^-24
    value = (float)rest * 5.9604644775390625e-8f;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
  }
  const uint32_t bits = sign | (rest >= 0x7c00u ? 0x7f800000u | (rest << 13) : (rest << 13) + 0x38000000u);
  memcpy(&value, &bits, 4);
  return value;
}
inline Float16 narrow_one(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {(uint16_t)(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return {(uint16_t)(sign | 0x7c00u)};  // rounds to infinity
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 leaves the multiple of 2^-24, rounded, in the low bits
    float size;
    memcpy(&size, &bits, 4);
    size += 0.5f;
    memcpy(&bits, &size, 4);
    return {(uint16_t)(sign | (bits - 0x3f000000u))};
  }
  return {(uint16_t)(sign | ((bits - 0x38000000u + 0x0fffu + ((bits >> 13) & 1u)) >> 13))};
}
inline FloatVec widen(const Float16* from) {
  FloatVec v;
  for (int i = 0; i < Simd<float>::kLanes; ++i) v[i] = widen_one(from[i]);
  return v;
}
inline void narrow(Float16* to, FloatVec v) {
  for (int i = 0; i < Simd<float>::kLanes; ++i) to[i] = narrow_one(v[i]);
}
#endif

template <class Half>
inline void narrow_through_float(Half* to, DoubleVec v) {
  // One lane at a time through a float register: rounding twice is within half a unit of the narrow type.
  FloatVec wide{};
  for (int i = 0; i < Simd<double>::kLanes; ++i) wide[i] = static_cast<float>(v[i]);
  Half buffer[Simd<float>::kLanes];
  narrow(buffer, wide);
  memcpy(to, buffer, sizeof(Half) * Simd<double>::kLanes);
}
inline void narrow(BFloat16* to, DoubleVec v) { narrow_through_float(to, v); }
inline void narrow(Float16* to, DoubleVec v) { narrow_through_float(to, v); }

// Write one register's worth around the caches. `to` must be aligned to what is written.
template <class Out, class Vec>
inline void narrow_around_caches(Out* to, const Vec& v) {
  Out entries[sizeof(Vec) / sizeof(v[0])];
  narrow(entries, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(entries) == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), load<__m512i>(entries));
    return;
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(entries) == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), load<__m256i>(entries));
    return;
  }
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(entries) == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), load<__m128i>(entries));
    return;
  }
#endif
  memcpy(to, entries, sizeof(entries));
}

// Writes around the caches are not ordered with later ones, not even with those that tell other threads to go on.
inline void fence_writes_around_caches() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Transpose a square block of one register a row.
inline void transpose(FloatVec row[Simd<float>::kLanes]) {
#if defined(__AVX512F__)
  // Pairs of entries, pairs of pairs, then the quarters of the registers.
  __m512i r[16], t[16];
  memcpy(r, row, sizeof(r));
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
  memcpy(row, r, sizeof(r));
#else
  constexpr int kLanes = Simd<float>::kLanes;
  float entries[kLanes][kLanes], turned[kLanes][kLanes];
  memcpy(entries, row, sizeof(entries));
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) turned[j][i] = entries[i][j];
  memcpy(row, turned, sizeof(turned));
#endif
}

}  // namespace

// Matrix products of a chunk for one instruction-set level: float32, and 16-bit operands into float32.
//
// The chunk's rows are few (n, 64 to 256) and the other matrix is the size of the head, so what matters is that the head
// is walked once, in order, fetched ahead of the arithmetic, and never copied as a whole, as a general matrix product
// does before it begins.
//
//   n rows of the chunk    v vocabulary    w width    unit: 32 bits that a lane multiplies at a time
//
// Where the CPU multiplies pairs of bfloat16 into float32 (AVX512-BF16), a unit is such a pair, the sums are half as many
// steps long, and the matrices are read as they lie or with two rows interleaved. Elsewhere a unit is a float, to which
// 16-bit entries are widened on the way.
#pragma once

#include "products.h"
#include "simd.h"

namespace {
namespace products {

using namespace vgs;

constexpr int kLanes = Simd<float>::kLanes;

struct Pair { uint32_t bits; };

template <class Unit>
struct Units;

template <>
struct Units<float> {
  using Vec = FloatVec;
  static constexpr int64_t kTerms = 1;
  static void add(FloatVec& sum, float left, FloatVec right) { sum += left * right; }
};

#if defined(__AVX512BF16__)
template <>
struct Units<Pair> {
  using Vec = Simd<float>::Unsigned;
  static constexpr int64_t kTerms = 2;
  static void add(FloatVec& sum, Pair left, Vec right) {
    const __m512i all = _mm512_set1_epi32(static_cast<int>(left.bits));
    sum = (FloatVec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)all, (__m512bh)right);
  }
};
#endif

bool multiplies_pairs(Element left, Element right) {
#if defined(__AVX512BF16__)
  return left == kBFloat16 && right == kBFloat16;
#else
  (void)left, (void)right;
  return false;
#endif
}

// Call f(Unit{}) with the unit of a product.
template <class F>
inline void with_unit(bool pairs, const F& f) {
#if defined(__AVX512BF16__)
  if (pairs) return f(Pair{});
#endif
  (void)pairs;
  f(float{});
}

template <class In>
inline void widen_row(const In* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, widen(from + i));
  if (i == n) return;
  In padded[kLanes] = {};
  memcpy(padded, from + i, (n - i) * sizeof(In));
  const FloatVec last = widen(padded);
  memcpy(to + i, &last, (n - i) * sizeof(float));
}

void widen_row(const void* from, Element element, int64_t n, float* to) {
  switch (element) {
    case kBFloat16: return widen_row(static_cast<const BFloat16*>(from), n, to);
    case kFloat16: return widen_row(static_cast<const Float16*>(from), n, to);
    default: memcpy(to, from, n * sizeof(float));
  }
}

// Entries of a row along a sum as units, `size` of them; what is missing to whole units is 0.
inline void units_along(const Matrix& matrix, int64_t row, int64_t column, int64_t size, float* to) {
  widen_row(matrix.at(row, column), matrix.element, size, to);
}
inline void units_along(const Matrix& matrix, int64_t row, int64_t column, int64_t size, Pair* to) {
  if (size % 2) to[size / 2] = Pair{0};
  memcpy(to, matrix.at(row, column), size * 2);
}

// One register of units across a sum: entries of a row, or of two rows interleaved. A row that is null is 0.
template <class In>
inline void unit_vector(const In* row, const In*, float* to) { store(to, widen(row)); }
inline void unit_vector(const BFloat16* even, const BFloat16* odd, Pair* to) {
  using Unsigned = Simd<float>::Unsigned;
  const auto wide = [](const BFloat16* row) { return __builtin_convertvector(load<Simd<float>::Half>(row), Unsigned); };
  store(to, odd ? wide(even) | wide(odd) << 16 : wide(even));
}

// `count` rows of `columns` columns as units across a sum, [units of the sum][pitch]. Whole registers are written, with
// zeros after the columns; where the pitch is no multiple of them, the next row of units overwrites what is too much.
template <class Unit, class In>
void units_across(const In* from, int64_t stride, int64_t count, int64_t columns, Unit* to, int64_t pitch) {
  constexpr int64_t kTerms = Units<Unit>::kTerms;
  for (int64_t row = 0; row < count; row += kTerms, from += kTerms * stride, to += pitch) {
    const In* const odd = row + 1 < count ? from + stride : nullptr;
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) unit_vector(from + i, odd ? odd + i : odd, to + i);
    if (i == columns) continue;
    In padded[2][kLanes] = {};
    memcpy(padded[0], from + i, (columns - i) * sizeof(In));
    if (kTerms == 2 && odd) memcpy(padded[1], odd + i, (columns - i) * sizeof(In));
    unit_vector(padded[0], padded[1], to + i);
  }
}

inline void units_across(const Matrix& m, int64_t row, int64_t count, int64_t column, int64_t columns, float* to,
                         int64_t pitch) {
  const void* const from = m.at(row, column);
  switch (m.element) {
    case kBFloat16: return units_across(static_cast<const BFloat16*>(from), m.stride, count, columns, to, pitch);
    case kFloat16: return units_across(static_cast<const Float16*>(from), m.stride, count, columns, to, pitch);
    default: return units_across(static_cast<const float*>(from), m.stride, count, columns, to, pitch);
  }
}
inline void units_across(const Matrix& m, int64_t row, int64_t count, int64_t column, int64_t columns, Pair* to,
                         int64_t pitch) {
#if defined(__AVX512BF16__)
  units_across(static_cast<const BFloat16*>(m.at(row, column)), m.stride, count, columns, to, pitch);
#else
  (void)m, (void)row, (void)count, (void)column, (void)columns, (void)to, (void)pitch;
#endif
}

template <class Out>
inline void narrow_row(const float* from, int64_t n, Out* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) narrow(to + i, load<FloatVec>(from + i));
  if (i == n) return;
  float padded[kLanes] = {};
  Out last[kLanes];
  memcpy(padded, from + i, (n - i) * sizeof(float));
  narrow(last, load<FloatVec>(padded));
  memcpy(to + i, last, (n - i) * sizeof(Out));
}

inline int64_t steps_of(int64_t terms, int64_t per_unit) { return (terms + per_unit - 1) / per_unit; }

// Add sums to what is there, or not, and write them in the dtype of the result.
template <class Out>
inline void write(Out* to, Out* remainder, FloatVec sum, bool accumulate) {
  if (!remainder) return narrow(to, accumulate ? widen(to) + sum : sum);
  if (accumulate) sum = widen(to) + (widen(remainder) + sum);
  narrow(to, sum);
  narrow(remainder, sum - widen(to));
}

template <class F>
inline void with_out(Element element, void* out, const F& f) {
  switch (element) {
    case kBFloat16: return f(static_cast<BFloat16*>(out));
    case kFloat16: return f(static_cast<Float16*>(out));
    default: return f(static_cast<float*>(out));
  }
}

// ---- head gradient: kTile rows of it by kColumns columns in registers

constexpr int kVectors = 2;
constexpr int kTile = kRegisterBytes == 64 ? 14 : 6;  // of 32 or 16 registers
constexpr int kColumns = kVectors * kLanes;
constexpr int kTileRead = (kTile + kLanes - 1) / kLanes * kLanes;  // whole registers, where the row is long enough

// Copy h (n, w) into column panels [w / kColumns][n / terms of a unit][kColumns], padded with zeros.
template <class Unit>
void pack_columns_as(const Matrix& hidden, int64_t n, int64_t width, Unit* panels) {
  for (int64_t column = 0; column < width; column += kColumns) {
    const int64_t count = width - column < kColumns ? width - column : kColumns, steps = steps_of(n, Units<Unit>::kTerms);
    if (count < kColumns) memset(panels, 0, steps * kColumns * sizeof(Unit));
    units_across(hidden, 0, n, column, count, panels, kColumns);
    panels += steps * kColumns;
  }
}

void pack_columns(const Matrix& hidden, bool pairs, int64_t n, int64_t width, float* panels) {
  with_unit(pairs, [&](auto unit) { pack_columns_as(hidden, n, width, reinterpret_cast<decltype(unit)*>(panels)); });
}

template <class Unit, class Out>
inline void head_gradient_tile(const Unit* gradient, const Unit* hidden, int64_t steps, Out* out, Out* remainder,
                               int64_t out_stride, bool accumulate, const Out* next) {
  using Vec = typename Units<Unit>::Vec;
  FloatVec sum[kTile][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) {
    __builtin_prefetch(next + i * out_stride, 1);
    __builtin_prefetch(next + i * out_stride + kColumns - 1, 1);
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j] = FloatVec{};
  }
  for (int64_t k = 0; k < steps; ++k) {
    Vec h[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) h[j] = load<Vec>(hidden + k * kColumns + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) Units<Unit>::add(sum[i][j], gradient[k * kTile + i], h[j]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const int64_t at = i * out_stride + j * kLanes;
      write(out + at, remainder ? remainder + at : nullptr, sum[i][j], accumulate);
    }
  }
}

template <class Unit, class Out>
void head_gradient_as(const Matrix& gradient, const Unit* panels, int64_t n, int64_t vocab, int64_t width, Out* out,
                      const Sums& sums, int64_t begin, int64_t end, Unit* scratch) {
  const int64_t out_stride = sums.stride;
  auto* const remainders = static_cast<Out*>(sums.remainder);
  const int64_t steps = steps_of(n, Units<Unit>::kTerms);
  float edge[kTile * kColumns];
  for (int64_t v = begin; v < end; v += kTile) {
    const int64_t rows = end - v < kTile ? end - v : kTile;
    const int64_t read = vocab - v < kTileRead ? vocab - v : kTileRead;
    units_across(gradient, 0, n, v, read, scratch, kTile);
    for (int64_t column = 0; column < width; column += kColumns) {
      const Unit* hidden = panels + column * steps;
      Out* const tile = out + v * out_stride + column;
      Out* const remainder = remainders ? remainders + v * out_stride + column : nullptr;
      if (rows == kTile && column + kColumns <= width) {
        // The tile after the next one: this tile was asked for while the one before the last was computed.
        const bool last = column + 2 * kColumns >= width;
        const Out* next = tile + 2 * kColumns + (last ? kTile * out_stride - (width / kColumns) * kColumns : 0);
        head_gradient_tile(scratch, hidden, steps, tile, remainder, out_stride, sums.accumulate, next);
        continue;
      }
      head_gradient_tile<Unit, float>(scratch, hidden, steps, edge, nullptr, kColumns, false, edge);
      const int64_t columns = width - column < kColumns ? width - column : kColumns;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; j += kLanes) {
          const int64_t count = columns - j < kLanes ? columns - j : kLanes, at = i * out_stride + j;
          Out entries[kLanes] = {}, rest[kLanes] = {};
          memcpy(entries, tile + at, count * sizeof(Out));
          if (remainder) memcpy(rest, remainder + at, count * sizeof(Out));
          write(entries, remainder ? rest : nullptr, load<FloatVec>(edge + i * kColumns + j), sums.accumulate);
          memcpy(tile + at, entries, count * sizeof(Out));
          if (remainder) memcpy(remainder + at, rest, count * sizeof(Out));
        }
    }
  }
}

void head_gradient(const Matrix& gradient, const float* panels, bool pairs, int64_t n, int64_t vocab, int64_t width,
                   const Sums& out, int64_t begin, int64_t end, float* scratch) {
  with_unit(pairs, [&](auto unit) {
    using Unit = decltype(unit);
    with_out(out.element, out.data, [&](auto* to) {
      head_gradient_as(gradient, reinterpret_cast<const Unit*>(panels), n, vocab, width, to, out, begin, end,
                       reinterpret_cast<Unit*>(scratch));
    });
  });
}

// ---- logits: rows of the weight, read as they lie, by a group of rows of the chunk

constexpr int kGroupVectors = 4;
constexpr int kGroup = kGroupVectors * kLanes;
constexpr int kLogitTile = kRegisterBytes == 64 ? 6 : 3;  // with the group's vectors and a broadcast: 29 or 16 registers
constexpr int64_t kLogitBand = 96;  // rows of the weight between two transpositions

// Steps of a logit that are summed in a row, and then in a row of such sums: a chain rounds more the longer it is, and a
// divergence near 0 is all rounding.
constexpr int64_t kSteps = 64;

// Arrange the rows of a chunk as [group][step][kGroup], padded with zeros.
template <class Unit>
void pack_rows_as(const Matrix& hidden, int64_t n, int64_t width, Unit* panels) {
  constexpr int64_t kTerms = Units<Unit>::kTerms, kBlock = 256;
  const int64_t steps = steps_of(width, kTerms);
  for (int64_t row = 0; row < (n + kGroup - 1) / kGroup * kGroup; ++row) {
    Unit* const to = panels + row / kGroup * steps * kGroup + row % kGroup;
    for (int64_t start = 0; start < steps; start += kBlock) {
      const int64_t count = steps - start < kBlock ? steps - start : kBlock;
      Unit units[kBlock] = {};
      const int64_t terms = width - start * kTerms < kBlock * kTerms ? width - start * kTerms : kBlock * kTerms;
      if (row < n) units_along(hidden, row, start * kTerms, terms, units);
      for (int64_t k = 0; k < count; ++k) to[(start + k) * kGroup] = units[k];
    }
  }
}

void pack_rows(const Matrix& hidden, bool pairs, int64_t n, int64_t width, float* panels) {
  with_unit(pairs, [&](auto unit) { pack_rows_as(hidden, n, width, reinterpret_cast<decltype(unit)*>(panels)); });
}

// out [kRows][kGroup] = kRows rows of the weight, `row_bytes` apart, by kUsed vectors of a group.
template <class Unit, int kRows, int kUsed>
void logits_tile(const char* weight, int64_t row_bytes, const Unit* hidden, int64_t steps, float* out) {
  using Vec = typename Units<Unit>::Vec;
  for (int64_t start = 0; start == 0 || start < steps; start += kSteps) {  // of width 0, sums of 0
    const int64_t end = steps - start < kSteps ? steps : start + kSteps;
    FloatVec sum[kRows][kUsed];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kUsed; ++j) sum[i][j] = FloatVec{};
    for (int64_t k = start; k < end; ++k) {
      Vec h[kUsed];
#pragma GCC unroll 4
      for (int j = 0; j < kUsed; ++j) h[j] = load<Vec>(hidden + k * kGroup + j * kLanes);
      if (k % 16 == 0) {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) __builtin_prefetch(weight + (kRows + i) * row_bytes + k * sizeof(Unit));
      }
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Unit w = load<Unit>(weight + i * row_bytes + k * sizeof(Unit));
#pragma GCC unroll 4
        for (int j = 0; j < kUsed; ++j) Units<Unit>::add(sum[i][j], w, h[j]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kUsed; ++j) {
        float* to = out + i * kGroup + j * kLanes;
        store(to, start == 0 ? sum[i][j] : load<FloatVec>(to) + sum[i][j]);
      }
  }
}

// A band of the weight by a group. The last tile overlaps the one before it; `weight` has kLogitTile rows or more.
template <class Unit, int kUsed>
void logits_band(const char* weight, int64_t row_bytes, int64_t rows, const Unit* hidden, int64_t steps, float* out) {
  for (int64_t v = 0; v < rows; v += kLogitTile) {
    const int64_t first = v + kLogitTile <= rows ? v : rows - kLogitTile;
    logits_tile<Unit, kLogitTile, kUsed>(weight + first * row_bytes, row_bytes, hidden, steps, out + first * kGroup);
  }
}

// Write `tokens` rows of `columns` logits from sums [column][kGroup]. Whole cache lines leave past the caches, since a chunk
// of logits does not fit in any.
template <class Out>
void write_logits(const float* sums, int64_t tokens, int64_t columns, const float* bias, Out* out, int64_t stride) {
  constexpr bool kWholeLines = kLanes * sizeof(Out) == 64;
  const bool around = kWholeLines && reinterpret_cast<uintptr_t>(out) % 64 == 0 && stride * sizeof(Out) % 64 == 0;
  for (int64_t token = 0; token < tokens; token += kLanes) {
    const int64_t rows = tokens - token < kLanes ? tokens - token : kLanes;
    for (int64_t v = 0; v < columns; v += kLanes) {
      const int64_t count = columns - v < kLanes ? columns - v : kLanes;
      FloatVec block[kLanes];
      for (int i = 0; i < kLanes; ++i)
        block[i] = i < count ? load<FloatVec>(sums + (v + i) * kGroup + token) : FloatVec{};
      transpose(block);
      FloatVec added = {};
      if (bias) memcpy(&added, bias + v, count * sizeof(float));
      for (int64_t i = 0; i < rows; ++i) {
        Out* const to = out + (token + i) * stride + v;
        if (count < kLanes) {
          const FloatVec last = block[i] + added;
          narrow_row(reinterpret_cast<const float*>(&last), count, to);
        } else if (around) {
          narrow_around_caches(to, block[i] + added);
        } else {
          narrow(to, block[i] + added);
        }
      }
    }
  }
}

// Band sums, and the band itself where it has to be widened or has fewer rows than a tile.
int64_t logit_scratch(int64_t width) { return kLogitBand * (kGroup + width); }

void logits(const float* panels, bool pairs, const Matrix& weight, int64_t n, int64_t width, const float* bias, void* out,
            Element out_element, int64_t out_stride, int64_t begin, int64_t end, float* scratch) {
  float* const copy = scratch + kLogitBand * kGroup;
  for (int64_t band = begin; band < end; band += kLogitBand) {
    const int64_t rows = end - band < kLogitBand ? end - band : kLogitBand;
    with_unit(pairs, [&](auto unit) {
      using Unit = decltype(unit);
      const int64_t steps = steps_of(width, Units<Unit>::kTerms);
      const char* from = static_cast<const char*>(weight.at(band, 0));
      int64_t row_bytes = weight.stride * kElementSize[weight.element];
      const bool as_it_lies = weight.element == (pairs ? kBFloat16 : kFloat32) && width % Units<Unit>::kTerms == 0;
      if (!as_it_lies || rows < kLogitTile) {
        auto* units = reinterpret_cast<Unit*>(copy);
        for (int64_t i = 0; i < rows; ++i) units_along(weight, band + i, 0, width, units + i * steps);
        if (rows < kLogitTile) memset(units + rows * steps, 0, (kLogitTile - rows) * steps * sizeof(Unit));
        from = reinterpret_cast<const char*>(units), row_bytes = steps * sizeof(Unit);
      }
      const int64_t computed = rows < kLogitTile ? kLogitTile : rows;
      for (int64_t group = 0; group * kGroup < n; ++group) {
        const auto* hidden = reinterpret_cast<const Unit*>(panels) + group * steps * kGroup;
        const int64_t tokens = n - group * kGroup < kGroup ? n - group * kGroup : kGroup;
        switch ((tokens + kLanes - 1) / kLanes) {
          case 1: logits_band<Unit, 1>(from, row_bytes, computed, hidden, steps, scratch); break;
          case 2: logits_band<Unit, 2>(from, row_bytes, computed, hidden, steps, scratch); break;
          case 3: logits_band<Unit, 3>(from, row_bytes, computed, hidden, steps, scratch); break;
          default: logits_band<Unit, 4>(from, row_bytes, computed, hidden, steps, scratch);
        }
        with_out(out_element, out, [&](auto* to) {
          write_logits(scratch, tokens, rows, bias ? bias + band : nullptr, to + group * kGroup * out_stride + band,
                       out_stride);
        });
      }
    });
  }
  fence_writes_around_caches();
}

// ---- hidden gradient: a tile of at most kTile rows of the chunk by kColumns columns, summed over a band of the weight

// Units of a sum in a band. Two bands stay in the second-level cache: the one that all tiles pass over, and the next,
// which they fetch meanwhile.
constexpr int64_t kBand = 96;

// Lines of the weight that the tiles of a panel fetch, one every `step` units: those of the same columns in the next band,
// and those of the next columns in this one, which are about to be packed. Fetched in one go, they would wait for each
// other.
struct Ahead {
  const char* row;
  int64_t row_bytes, lines_of_row, rows, next_band, step, line = 0;

  void fetch() {
    if (rows == 0) return;
    if (next_band) __builtin_prefetch(row + next_band + line * 64, 0, 2);
    __builtin_prefetch(row + (lines_of_row + line) * 64);
    if (++line < lines_of_row) return;
    line = 0, row += row_bytes, --rows;
  }
};

template <class Unit, int kRows>
inline void hidden_gradient_tile(const Unit* gradient, const Unit* weight, int64_t steps, float* out, int64_t out_stride,
                                 int64_t rows, bool accumulate, Ahead& ahead) {
  using Vec = typename Units<Unit>::Vec;
  FloatVec sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j] = FloatVec{};
  int64_t waited = 0;
  for (int64_t k = 0; k < steps; ++k) {
    Vec w[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) w[j] = load<Vec>(weight + k * kColumns + j * kLanes);
    if (++waited >= ahead.step) waited = 0, ahead.fetch();
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) Units<Unit>::add(sum[i][j], gradient[i * kBand + k], w[j]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* const to = out + i * out_stride + j * kLanes;
      store(to, accumulate ? load<FloatVec>(to) + sum[i][j] : sum[i][j]);
    }
  }
}

// `scratch` holds (n rounded up to kRows + kColumns) * kBand units, and one tile.
template <class Unit, int kRows>
void hidden_gradient_of(const Matrix& gradient, const Matrix& weight, int64_t n, int64_t vocab, float* out,
                        int64_t out_stride, int64_t begin, int64_t end, Unit* scratch) {
  constexpr int64_t kTerms = Units<Unit>::kTerms, kDeep = kBand * kTerms;
  const int64_t tiles = (n + kRows - 1) / kRows, entry = kElementSize[weight.element];
  const int64_t lines_of_row = (kColumns * entry + 63) / 64;
  // (kBand, kColumns) of the weight, padded with zeros. As they lie, rows a power of two apart would evict each other from
  // the first-level cache.
  Unit* const packed = scratch + tiles * kRows * kBand;
  float* const edge = reinterpret_cast<float*>(packed + kColumns * kBand + kLanes);
  for (int64_t start = 0; start == 0 || start < vocab; start += kDeep) {  // without a vocabulary, sums of 0
    const int64_t depth = vocab - start < kDeep ? vocab - start : kDeep, steps = steps_of(depth, kTerms);
    const bool is_last = vocab - start - depth < depth;
    const int64_t lines = (lines_of_row * depth + tiles - 1) / tiles, step = lines ? steps / lines : 1;
    for (int64_t row = 0; row < tiles * kRows; ++row) {
      Unit* const to = scratch + row * kBand;
      if (row >= n) {
        memset(to, 0, steps * sizeof(Unit));
        continue;
      }
      if (!is_last)
        for (int64_t k = 0; k < kDeep * kElementSize[gradient.element]; k += 64)
          __builtin_prefetch(static_cast<const char*>(gradient.at(row, start + kDeep)) + k);
      units_along(gradient, row, start, depth, to);
    }
    for (int64_t column = begin; column < end; column += kColumns) {
      const int64_t columns = end - column < kColumns ? end - column : kColumns;
      if (columns < kColumns) memset(packed, 0, steps * kColumns * sizeof(Unit));
      units_across(weight, start, depth, column, columns, packed, kColumns);
      const int64_t row_bytes = weight.stride * entry;
      Ahead ahead = {static_cast<const char*>(weight.at(start, column)), row_bytes, lines_of_row, depth,
                     is_last ? 0 : kDeep * row_bytes, step};
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t rows = n - tile * kRows < kRows ? n - tile * kRows : kRows;
        const Unit* coefficients = scratch + tile * kRows * kBand;
        float* to = out + tile * kRows * out_stride + column;
        if (columns < kColumns) {
          hidden_gradient_tile<Unit, kRows>(coefficients, packed, steps, edge, kColumns, rows, false, ahead);
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j) {
              float& sum = to[i * out_stride + j];
              sum = (start > 0 ? sum : 0.0f) + edge[i * kColumns + j];
            }
        } else {
          hidden_gradient_tile<Unit, kRows>(coefficients, packed, steps, to, out_stride, rows, start > 0, ahead);
        }
      }
    }
  }
}

// Tiles of equal height waste the least arithmetic: 64 rows are five tiles of 13, not of 14.
template <class Unit, int kRows>
void hidden_gradient_of_height(int64_t height, const Matrix& gradient, const Matrix& weight, int64_t n, int64_t vocab,
                               float* out, int64_t out_stride, int64_t begin, int64_t end, Unit* scratch) {
  if constexpr (kRows > kTile / 2) {
    if (height < kRows)
      return hidden_gradient_of_height<Unit, kRows - 1>(height, gradient, weight, n, vocab, out, out_stride, begin, end,
                                                        scratch);
  }
  hidden_gradient_of<Unit, kRows>(gradient, weight, n, vocab, out, out_stride, begin, end, scratch);
}

void hidden_gradient(const Matrix& gradient, const Matrix& weight, bool pairs, int64_t n, int64_t vocab, float* sums,
                     int64_t sums_stride, void* out, Element out_element, int64_t out_stride, int64_t begin, int64_t end,
                     float* scratch) {
  const int64_t tiles = (n + kTile - 1) / kTile;
  with_unit(pairs, [&](auto unit) {
    hidden_gradient_of_height<decltype(unit), kTile>((n + tiles - 1) / tiles, gradient, weight, n, vocab, sums,
                                                     sums_stride, begin, end, reinterpret_cast<decltype(unit)*>(scratch));
  });
  if (out == sums) return;
  with_out(out_element, out, [&](auto* to) {
    for (int64_t row = 0; row < n; ++row)
      narrow_row(sums + row * sums_stride + begin, end - begin, to + row * out_stride + begin);
  });
}

}  // namespace products

constexpr vgs::ProductKernels kProducts = {
    products::multiplies_pairs, products::kGroup,        products::kLogitBand, products::logit_scratch,
    products::pack_rows,        products::logits,        products::kTile,      products::kColumns,
    products::pack_columns,     products::head_gradient, products::kBand,      products::hidden_gradient};

}  // namespace

// Float32 matrix products of a chunk for one instruction-set level.
//
// The chunk's rows are few (n, about 64) and the other matrix is the size of the head, so what matters is that the head
// is walked once, in order, fetched ahead of the arithmetic, and never copied as a whole, as a general matrix product
// does before it begins.
//
//   n rows of the chunk    v vocabulary    w width    kTile x kColumns accumulators, all in registers
#pragma once

#include "products.h"
#include "simd.h"

namespace {
namespace products {

constexpr int kVectors = 2;
constexpr int kTile = kRegisterBytes == 64 ? 14 : 6;  // of 32 or 16 registers
constexpr int kColumns = kVectors * Simd<float>::kLanes;

// Copy h (n, w) into column panels [w / kColumns][n][kColumns], padded with zeros. `panels` holds
// n * (w rounded up to kColumns) floats.
void pack_hidden(const float* hidden, int64_t row_stride, int64_t n, int64_t width, float* panels) {
  for (int64_t column = 0; column < width; column += kColumns) {
    const int64_t count = width - column < kColumns ? width - column : kColumns;
    for (int64_t row = 0; row < n; ++row, panels += kColumns) {
      for (int64_t i = 0; i < kColumns; ++i) panels[i] = i < count ? hidden[row * row_stride + column + i] : 0.0f;
    }
  }
}

// One tile: kTile rows of the head gradient by kColumns columns.
inline void head_gradient_tile(const float* gradient, const float* hidden, int64_t n, float* out, int64_t out_stride,
                               bool accumulate, const float* next) {
  constexpr int kLanes = Simd<float>::kLanes;
  FloatVec sum[kTile][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) {
    __builtin_prefetch(next + i * out_stride, 1);
    __builtin_prefetch(next + i * out_stride + kColumns - 1, 1);
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j] = FloatVec{};
  }
  for (int64_t k = 0; k < n; ++k) {
    FloatVec h[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) h[j] = load<FloatVec>(hidden + k * kColumns + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) {
      const FloatVec g = gradient[k * kTile + i] - FloatVec{};  // a broadcast; adding 0 would be an addition
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[i][j] += g * h[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* to = out + i * out_stride + j * kLanes;
      store(to, accumulate ? load<FloatVec>(to) + sum[i][j] : sum[i][j]);
    }
  }
}

// out[v, w] = or += sum over n of gradient[n, v] * hidden[n, w], for the rows [begin, end) of out.
void head_gradient(const float* gradient, int64_t gradient_stride, const float* panels, int64_t n, int64_t width,
                   float* out, int64_t out_stride, int64_t begin, int64_t end, bool accumulate, float* scratch) {
  float edge[kTile * kColumns];
  for (int64_t v = begin; v < end; v += kTile) {
    const int64_t rows = end - v < kTile ? end - v : kTile;
    for (int64_t k = 0; k < n; ++k)
      for (int64_t i = 0; i < kTile; ++i) scratch[k * kTile + i] = i < rows ? gradient[k * gradient_stride + v + i] : 0.0f;
    for (int64_t column = 0; column < width; column += kColumns) {
      const float* hidden = panels + column * n;
      float* const tile = out + v * out_stride + column;
      if (rows == kTile && column + kColumns <= width) {
        // The tile after the next one: this tile was asked for while the one before the last was computed.
        const bool last = column + 2 * kColumns >= width;
        const float* next = tile + 2 * kColumns + (last ? kTile * out_stride - (width / kColumns) * kColumns : 0);
        head_gradient_tile(scratch, hidden, n, tile, out_stride, accumulate, next);
        continue;
      }
      head_gradient_tile(scratch, hidden, n, edge, kColumns, false, edge);
      const int64_t columns = width - column < kColumns ? width - column : kColumns;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
          float& to = tile[i * out_stride + j];
          to = (accumulate ? to : 0.0f) + edge[i * kColumns + j];
        }
    }
  }
}

// Logits: kLogitTile rows of the weight by a group of kGroup rows of the chunk. The weight is read as it lies.
constexpr int kLogitVectors = 4;
constexpr int kLogitTile = kRegisterBytes == 64 ? 7 : 3;
constexpr int kGroup = kLogitVectors * Simd<float>::kLanes;
constexpr int64_t kLogitBand = 16 * kLogitTile;  // rows of the weight between two transpositions

// Terms of a logit that are summed in a row: one chain over the whole width would have twice the rounding of a library.
constexpr int64_t kDepth = 256;

inline void logits_tile(const float* weight, int64_t weight_stride, const float* hidden, int64_t width, float* out) {
  constexpr int kLanes = Simd<float>::kLanes;
  for (int64_t start = 0; start < width; start += kDepth) {
    const int64_t end = width - start < kDepth ? width : start + kDepth;
    FloatVec sum[kLogitTile][kLogitVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kLogitTile; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kLogitVectors; ++j) sum[i][j] = FloatVec{};
    for (int64_t k = start; k < end; ++k) {
      FloatVec h[kLogitVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kLogitVectors; ++j) h[j] = load<FloatVec>(hidden + k * kGroup + j * kLanes);
      if (k % 16 == 0) {
#pragma GCC unroll 16
        for (int i = 0; i < kLogitTile; ++i) __builtin_prefetch(weight + (kLogitTile + i) * weight_stride + k);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLogitTile; ++i) {
        const FloatVec w = weight[i * weight_stride + k] - FloatVec{};
#pragma GCC unroll 4
        for (int j = 0; j < kLogitVectors; ++j) sum[i][j] += w * h[j];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLogitTile; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kLogitVectors; ++j) {
        float* to = out + i * kGroup + j * kLanes;
        store(to, start == 0 ? sum[i][j] : load<FloatVec>(to) + sum[i][j]);
      }
  }
}

// out[n, v] = sum over w of hidden[n, w] * weight[v, w] for the vocabulary [begin, end). `panels` is hidden transposed,
// [group][w][kGroup], padded with zeros; `scratch` holds kLogitBand * kGroup floats.
void logits(const float* panels, const float* weight, int64_t weight_stride, int64_t n, int64_t width, float* out,
            int64_t out_stride, int64_t begin, int64_t end, float* scratch) {
  for (int64_t band = begin; band < end; band += kLogitBand) {
    const int64_t rows = end - band < kLogitBand ? end - band : kLogitBand;
    for (int64_t group = 0; group * kGroup < n; ++group) {
      const float* hidden = panels + group * width * kGroup;
      for (int64_t v = 0; v < rows; v += kLogitTile) {
        // The last tile of the vocabulary overlaps the one before it, where there is one.
        const int64_t first = v + kLogitTile <= rows || rows < kLogitTile ? v : rows - kLogitTile;
        if (rows < kLogitTile) {
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < kGroup; ++j) {
              float total = 0.0f;
              for (int64_t k = 0; k < width; ++k) total += weight[(band + i) * weight_stride + k] * hidden[k * kGroup + j];
              scratch[i * kGroup + j] = total;
            }
        } else {
          logits_tile(weight + (band + first) * weight_stride, weight_stride, hidden, width, scratch + first * kGroup);
        }
      }
      const int64_t tokens = n - group * kGroup < kGroup ? n - group * kGroup : kGroup;
      for (int64_t j = 0; j < tokens; ++j) {
        float* to = out + (group * kGroup + j) * out_stride + band;
        for (int64_t i = 0; i < rows; ++i) to[i] = scratch[i * kGroup + j];
      }
    }
  }
}

// Hidden gradient: a tile of at most kTile rows of the chunk by kColumns columns, summed over kBand rows of the weight.
// Two bands stay in the second-level cache: the one that all tiles pass over, and the next, which they fetch meanwhile.
constexpr int64_t kBand = 96;

// The lines of the next band's columns that one tile fetches: `count` from `first` on, one every `step` rows.
struct Ahead {
  const float* panel;
  int64_t stride, first, count, step;
};

// The first tile of a panel copies it into `packed`, where its rows no longer lie a whole row of the weight apart: at a
// power of two they would evict each other from the first-level cache.
template <int kRows, bool kPacks>
inline void hidden_gradient_tile(const float* gradient, const float* weight, int64_t weight_stride, int64_t depth,
                                 float* packed, float* out, int64_t out_stride, int64_t rows, bool accumulate,
                                 const Ahead& ahead) {
  constexpr int kLanes = Simd<float>::kLanes;
  FloatVec sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j] = FloatVec{};
  int64_t line = ahead.first, waited = 0;
  const int64_t last = ahead.first + ahead.count;
  for (int64_t k = 0; k < depth; ++k) {
    FloatVec w[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) w[j] = load<FloatVec>(weight + k * weight_stride + j * kLanes);
    if constexpr (kPacks)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) store(packed + k * kColumns + j * kLanes, w[j]);
    if (++waited == ahead.step && line < last) {
      __builtin_prefetch(ahead.panel + line / 2 * ahead.stride + line % 2 * kLanes, 0, 2);
      ++line, waited = 0;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const FloatVec g = gradient[i * kBand + k] - FloatVec{};  // a broadcast; adding 0 would be an addition
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[i][j] += g * w[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* to = out + i * out_stride + j * kLanes;
      store(to, accumulate ? load<FloatVec>(to) + sum[i][j] : sum[i][j]);
    }
  }
}

// out[n, w] = sum over v of gradient[n, v] * weight[v, w] for the columns [begin, end) of out, in tiles of kRows rows.
// `scratch` holds (n rounded up to kRows + kColumns) * kBand floats, and one tile.
template <int kRows>
void hidden_gradient_of(const float* gradient, int64_t gradient_stride, const float* weight, int64_t weight_stride,
                        int64_t n, int64_t vocab, float* out, int64_t out_stride, int64_t begin, int64_t end,
                        float* scratch) {
  const int64_t tiles = (n + kRows - 1) / kRows;
  float* const packed = scratch + tiles * kRows * kBand;  // (kBand, kColumns) of the weight, padded with zeros
  float* const edge = packed + kColumns * kBand;
  for (int64_t start = 0; start < vocab; start += kBand) {
    const int64_t depth = vocab - start < kBand ? vocab - start : kBand;
    // Spread over the tiles: fetched in one go, the lines would wait for each other.
    const int64_t lines = vocab - start - depth < depth ? 0 : (2 * depth + tiles - 1) / tiles;
    const int64_t step = lines ? depth / lines : 0;
    for (int64_t row = 0; row < tiles * kRows; ++row) {
      const float* from = gradient + row * gradient_stride + start;
      if (row < n && lines)
        for (int64_t k = 0; k < kBand; k += 16) __builtin_prefetch(from + kBand + k);
      for (int64_t k = 0; k < depth; ++k) scratch[row * kBand + k] = row < n ? from[k] : 0.0f;
    }
    for (int64_t column = begin; column < end; column += kColumns) {
      const float* panel = weight + start * weight_stride + column;
      const int64_t columns = end - column < kColumns ? end - column : kColumns;
      if (columns < kColumns)
        for (int64_t k = 0; k < depth; ++k)
          for (int64_t j = 0; j < kColumns; ++j)
            packed[k * kColumns + j] = j < columns ? panel[k * weight_stride + j] : 0.0f;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t rows = n - tile * kRows < kRows ? n - tile * kRows : kRows;
        const float* coefficients = scratch + tile * kRows * kBand;
        float* to = out + tile * kRows * out_stride + column;
        const Ahead ahead = {panel + kBand * weight_stride, weight_stride, tile * lines, lines, step};
        if (columns < kColumns) {
          hidden_gradient_tile<kRows, false>(coefficients, packed, kColumns, depth, nullptr, edge, kColumns, rows, false,
                                             {});
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j) {
              float& sum = to[i * out_stride + j];
              sum = (start > 0 ? sum : 0.0f) + edge[i * kColumns + j];
            }
        } else if (tile == 0) {
          hidden_gradient_tile<kRows, true>(coefficients, panel, weight_stride, depth, packed, to, out_stride, rows,
                                            start > 0, ahead);
        } else {
          hidden_gradient_tile<kRows, false>(coefficients, packed, kColumns, depth, nullptr, to, out_stride, rows,
                                             start > 0, ahead);
        }
      }
    }
  }
}

// Tiles of equal height waste the least arithmetic: 64 rows are five tiles of 13, not of 14.
template <int kRows>
void hidden_gradient_of_height(int64_t height, const float* gradient, int64_t gradient_stride, const float* weight,
                               int64_t weight_stride, int64_t n, int64_t vocab, float* out, int64_t out_stride,
                               int64_t begin, int64_t end, float* scratch) {
  if constexpr (kRows > kTile / 2) {
    if (height < kRows)
      return hidden_gradient_of_height<kRows - 1>(height, gradient, gradient_stride, weight, weight_stride, n, vocab,
                                                  out, out_stride, begin, end, scratch);
  }
  hidden_gradient_of<kRows>(gradient, gradient_stride, weight, weight_stride, n, vocab, out, out_stride, begin, end,
                            scratch);
}

void hidden_gradient(const float* gradient, int64_t gradient_stride, const float* weight, int64_t weight_stride,
                     int64_t n, int64_t vocab, float* out, int64_t out_stride, int64_t begin, int64_t end,
                     float* scratch) {
  const int64_t tiles = (n + kTile - 1) / kTile;
  hidden_gradient_of_height<kTile>((n + tiles - 1) / tiles, gradient, gradient_stride, weight, weight_stride, n, vocab,
                                   out, out_stride, begin, end, scratch);
}

}  // namespace products

constexpr vgs::ProductKernels kProducts = {
    products::kTile,  products::kColumns,    products::pack_hidden, products::head_gradient, products::kGroup,
    products::kLogitBand, products::logits, products::kBand,       products::hidden_gradient};

}  // namespace

// Float32 matrix products of linear_decomposed_kl for one instruction-set level.
//
// The chunk's rows are few (n, about 64) and the other matrix is the size of the head, so what matters is that the head
// is walked once, in order, fetched ahead of the arithmetic, and never copied. A general matrix product packs it first:
// on one core with AVX-512, n = 64, width 1024, vocabulary 151,936, MKL needs 1.8 s for the head gradient of 512 tokens
// where the arithmetic alone is 0.9 s. (For the hidden gradient, which must pack the head, the same was tried: no gain.)
//
//   n rows of the chunk    v vocabulary    w width    kTile x kColumns accumulators, all in registers
#pragma once

#include "decomposed_kl.h"
#include "simd.h"

namespace {

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

inline void logits_tile(const float* weight, int64_t weight_stride, const float* hidden, int64_t width, float* out) {
  constexpr int kLanes = Simd<float>::kLanes;
  FloatVec sum[kLogitTile][kLogitVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kLogitTile; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kLogitVectors; ++j) sum[i][j] = FloatVec{};
  for (int64_t k = 0; k < width; ++k) {
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
    for (int j = 0; j < kLogitVectors; ++j) store(out + i * kGroup + j * kLanes, sum[i][j]);
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

}  // namespace

// What the launchers of the products (products.cpp) and their kernels of every instruction-set level share. No library
// templates: see kernels.h.
#pragma once

#include "element.h"

namespace vgs {

// A matrix whose rows lie `stride` entries apart.
struct Matrix {
  const void* data;
  Element element;  // not kFloat64
  int64_t stride;

  const void* at(int64_t row, int64_t column) const {
    return static_cast<const char*>(data) + (row * stride + column) * kElementSize[element];
  }
};

// A result that sums are added to, or that they replace. Where there is a remainder, of the layout of the result, it holds
// what rounding left of the sums so far: the result is then as good as if it had been summed in twice its digits.
struct Sums {
  void* data;
  void* remainder;  // or null
  Element element;
  int64_t stride;
  bool accumulate;
};

// The products of n rows of a chunk. All sums are float32. What the rows are multiplied with is arranged in panels of
// 32-bit units: a float, or two bfloat16 that are neighbours along the sum.
struct ProductKernels {
  // Whether matrices of two dtypes are multiplied as pairs of bfloat16: `pairs` of the functions below.
  bool (*multiplies_pairs)(Element left, Element right);

  // out[n, v] = bias[v] + sum over w of hidden[n, w] * weight[v, w] for the vocabulary [begin, end). `panels` holds
  // (n rounded up to `group`) * width units; the scratch of a thread `logit_scratch(width)` floats.
  int64_t group, logit_band;
  int64_t (*logit_scratch)(int64_t width);
  void (*pack_rows)(const Matrix& hidden, bool pairs, int64_t n, int64_t width, float* panels);
  void (*logits)(const float* panels, bool pairs, const Matrix& weight, int64_t n, int64_t width, const float* bias,
                 void* out, Element out_element, int64_t out_stride, int64_t begin, int64_t end, float* scratch);

  // out[v, w] = or += sum over n of gradient[n, v] * hidden[n, w] for the rows [begin, end) of out, `begin` a multiple of
  // `tile_rows`. `panels` holds n * (width rounded up to `panel_columns`) units, the scratch of a thread n * `tile_rows`
  // and 16.
  int64_t tile_rows, panel_columns;
  void (*pack_columns)(const Matrix& hidden, bool pairs, int64_t n, int64_t width, float* panels);
  void (*head_gradient)(const Matrix& gradient, const float* panels, bool pairs, int64_t n, int64_t vocab,
                        int64_t width, const Sums& out, int64_t begin, int64_t end, float* scratch);

  // out[n, w] = sum over v of gradient[n, v] * weight[v, w] for the columns [begin, end) of out, `begin` a multiple of
  // `panel_columns`. The sums are rounded at the end, or are `out` itself. The scratch of a thread holds `band` units for
  // each of n + tile_rows + panel_columns rows, and a tile.
  int64_t band;
  void (*hidden_gradient)(const Matrix& gradient, const Matrix& weight, bool pairs, int64_t n, int64_t vocab, float* sums,
                          int64_t sums_stride, void* out, Element out_element, int64_t out_stride, int64_t begin,
                          int64_t end, float* scratch);
};

}  // namespace vgs

// What the launchers of the products (products.cpp) and their kernels of every instruction-set level share. No library
// templates: see kernels.h.
#pragma once

#include <stdint.h>

namespace vgs {

// Of products_kernels.h; float32 throughout.
struct ProductKernels {
  // Rows of the head gradient to give to one thread are a multiple of `tile_rows`; panels hold
  // n * (width rounded up to `panel_columns`) floats, the scratch of a thread n * tile_rows.
  int64_t tile_rows, panel_columns;
  void (*pack_hidden)(const float* hidden, int64_t row_stride, int64_t n, int64_t width, float* panels);
  void (*head_gradient)(const float* gradient, int64_t gradient_stride, const float* panels, int64_t n, int64_t width,
                        float* out, int64_t out_stride, int64_t begin, int64_t end, bool accumulate, float* scratch);
  // Rows of the chunk in a group, and of the weight in a band; panels are [group][width][group rows], the scratch of a
  // thread one band by one group.
  int64_t group, logit_band;
  void (*logits)(const float* panels, const float* weight, int64_t weight_stride, int64_t n, int64_t width, float* out,
                 int64_t out_stride, int64_t begin, int64_t end, float* scratch);
  // The scratch of a thread holds `band` entries of the chunk's rows and of `panel_columns`, and a tile.
  int64_t band;
  void (*hidden_gradient)(const float* gradient, int64_t gradient_stride, const float* weight, int64_t weight_stride,
                          int64_t n, int64_t vocab, float* out, int64_t out_stride, int64_t begin, int64_t end,
                          float* scratch);
};

}  // namespace vgs

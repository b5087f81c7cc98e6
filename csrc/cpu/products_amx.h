// Products of bfloat16 on the matrix unit of recent Intel CPUs (AMX): the logits of a chunk, and products with few gathered
// rows, which both gradients of a filtered chunk are. No library templates: see kernels.h.
#pragma once

#include "element.h"

namespace vgs::amx {

// Rows of the chunk, and of the weight, that are multiplied at a time.
constexpr int64_t kBlock = 32;

// Floats of scratch that a thread needs for n rows.
constexpr int64_t scratch_size(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock * kBlock; }

// Arrange the rows of a chunk, padded with zeros to whole blocks, as the tiles of `logits`, in the order in which it reads
// them: n rounded up to kBlock times `width` entries, from a cache line on.
void pack_hidden(const uint16_t* hidden, int64_t stride, int64_t n, int64_t width, uint16_t* panels);

// out[n, v] = bias[v] + sum over w of hidden[n, w] * weight[v, w] for the vocabulary [begin, end), begin and `width`
// multiples of kBlock. `panels` is hidden, as pack_hidden arranges it; `bias` may be null; `scratch` begins a cache line too.
void logits(const uint16_t* panels, const uint16_t* weight, int64_t weight_stride, int64_t n, int64_t width,
            const float* bias, void* out, Element out_element, int64_t out_stride, int64_t begin, int64_t end,
            float* scratch);

// Rows that are gathered at a time, and the columns of them: with the rows after them and the sums of 128 rows they stay in
// the second-level cache, and one block of columns in the first.
constexpr int64_t kGathered = 256, kGatheredColumns = 1024;

// Floats and tile entries of scratch that a thread needs for n rows, n a multiple of kBlock; aligned to 64 bytes.
constexpr int64_t gathered_sums(int64_t n) { return n * kGatheredColumns; }
constexpr int64_t gathered_tiles() { return kGathered * kGatheredColumns; }

// out[n, w] = sum over k of left[n, k] * right[rows[k], w] for the columns [begin, end) of out, multiples of kBlock, and
// `count` rows. `left` is padded with zeros: [count / kGathered][n rounded up to kBlock][kGathered]. With `into` the
// result is added to row into[n] of out instead.
void gathered_product(const uint16_t* left, const uint16_t* right, int64_t right_stride, const int64_t* rows,
                      int64_t count, int64_t n, uint16_t* out, int64_t out_stride, const int64_t* into, int64_t begin,
                      int64_t end, float* sums, uint16_t* tiles);

}  // namespace vgs::amx

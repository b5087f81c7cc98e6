// Logits in bfloat16 on the matrix unit of recent Intel CPUs (AMX). No library headers: also included by the unit that is
// compiled for it.
#pragma once

#include <stdint.h>

namespace vgs::amx {

// Rows of the chunk, and of the weight, that are multiplied at a time.
constexpr int64_t kBlock = 32;

// Floats of scratch that a thread needs for n rows.
constexpr int64_t scratch_size(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock * kBlock; }

// out[n, v] = sum over w of hidden[n, w] * weight[v, w] for the vocabulary [begin, end), begin and `width` multiples of
// kBlock. `panels` is hidden, padded with zeros to whole blocks: [block][half of a block][width / 2][kBlock / 2][2].
void logits(const uint16_t* panels, const uint16_t* weight, int64_t weight_stride, int64_t n, int64_t width,
            uint16_t* out, int64_t out_stride, int64_t begin, int64_t end, float* scratch);

}  // namespace vgs::amx

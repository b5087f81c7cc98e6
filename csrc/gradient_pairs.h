// Lists of gradients as flat arrays, cut into chunks: what gradient_gramian and combine_gradients, on CPU and on CUDA,
// share. No torch headers: the CUDA emulator of the tests compiles this file too.
//
//   lang, vis   the two gradients of one parameter     out   where their combination goes
//   chunk       a run of entries of one parameter; the unit of work, and of the partial sums of a reduction
#pragma once

#include <stdint.h>

#include <vector>

#include "cpu/element.h"

namespace vgs {

struct GradientPair {
  const void* lang;  // null counts as zeros
  const void* vis;   // null counts as zeros
  void* out;         // null for a Gramian
  int64_t size;      // entries
  Element lang_element, vis_element, out_element;
};

constexpr int64_t kSmallestChunk = 65536;
constexpr int64_t kMostChunks = 8192;  // apart from one unfinished chunk per tensor

// Entries of a chunk, a power of two. It depends on the sizes alone, never on the number of threads or processors: the
// partial sums, and so the rounding of the result, are the same on every run.
inline int64_t chunk_size(const std::vector<GradientPair>& pairs) {
  int64_t total = 0;
  for (const GradientPair& pair : pairs) total += pair.size;
  int64_t chunk = kSmallestChunk;
  while (total / chunk > kMostChunks) chunk *= 2;
  return chunk;
}

inline int64_t chunks_of(const GradientPair& pair, int64_t chunk) { return (pair.size + chunk - 1) / chunk; }

}  // namespace vgs

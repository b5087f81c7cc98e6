// Kernel of combine_gradients: out = weights[0] * lang + weights[1] * vis over lists of tensors, in one pass over memory.
//
// `out` may be the tensor of lang or vis: a thread reads all of its entries before it writes them, and no other thread
// touches them. Hence no __restrict__ and no read-only loads here.
#pragma once

#include "gradient_lists.cuh"

namespace vgs::cuda {

template <class Acc>
__global__ void __launch_bounds__(kThreads) combine_chunks(const __grid_constant__ Table table, const Acc* weights) {
  Work work = find_work(table, blockIdx.x);
  const Acc lang_weight = weights[0], vis_weight = weights[1];  // read here: the host never waits for them
  // A gradient of weight 0 is not read, so that inf and NaN in it cannot come through as 0 * inf.
  if (lang_weight == Acc(0)) work.lang = nullptr;
  if (vis_weight == Acc(0)) work.vis = nullptr;
  const Acc u = work.lang ? lang_weight : Acc(0), v = work.vis ? vis_weight : Acc(0);
  const auto combine_entries = [&](int64_t begin, int64_t end) {
#pragma unroll 1  // at most a few entries, unless a view is unaligned; unrolled, they set the number of registers
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const Acc x = read_entry<Acc>(work.lang, work.lang_element, i);
      const Acc y = read_entry<Acc>(work.vis, work.vis_element, i);
      write_entry(work.out, work.out_element, i, u * x + v * y);
    }
  };
  combine_entries(work.begin, work.vector_begin);
  for (int64_t i = work.vector_begin + threadIdx.x * kGroup; i < work.vector_end; i += kThreads * kGroup) {
    Acc x[kGroup], y[kGroup];
    read_group(work.lang, work.lang_element, i, x);
    read_group(work.vis, work.vis_element, i, y);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) x[j] = u * x[j] + v * y[j];
    write_group(work.out, work.out_element, i, x);
  }
  combine_entries(work.vector_end, work.end);
}

}  // namespace vgs::cuda

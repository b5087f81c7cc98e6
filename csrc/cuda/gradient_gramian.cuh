// Kernels of gradient_gramian: <lang, lang>, <lang, vis>, <vis, vis> of two lists of tensors in one pass over memory.
//
// Two stages, no atomics: every block writes the sums of its chunk, one block adds those up in a fixed order. The result
// is the same on every run. A thread sums in Acc over the few hundred entries it sees of a chunk; sums over threads and
// over chunks are double, so that the error does not grow with the length of the gradient.
#pragma once

#include "gradient_lists.cuh"

namespace vgs::cuda {

constexpr int kWarps = kThreads / 32;

__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(0xffffffffu, x, offset);
  return x;
}

// Three sums over the block; complete in thread 0.
static __device__ void block_sum(double (&sums)[3]) {
  __shared__ Shared<double, 3 * kWarps> of_warps;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    sums[i] = warp_sum(sums[i]);
    if (lane == 0) of_warps[i * kWarps + warp] = sums[i];
  }
  __syncthreads();  // without it, warp 0 adds up what other warps have not written yet
  if (warp != 0) return;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    double sum = 0.0;
    if (lane < kWarps) sum = of_warps[i * kWarps + lane];
    sums[i] = warp_sum(sum);
  }
}

template <class Acc>
__global__ void __launch_bounds__(kThreads) chunk_products(const __grid_constant__ Table table, double* parts) {
  const Work work = find_work(table, blockIdx.x);
  Acc lang_lang = 0, lang_vis = 0, vis_vis = 0;
  const auto add = [&](Acc x, Acc y) {
    lang_lang += x * x;
    lang_vis += x * y;
    vis_vis += y * y;
  };
  const auto add_entries = [&](int64_t begin, int64_t end) {
#pragma unroll 1  // at most a few entries, unless a view is unaligned; unrolled, they set the number of registers
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads)
      add(read_entry<Acc>(work.lang, work.lang_element, i), read_entry<Acc>(work.vis, work.vis_element, i));
  };
  add_entries(work.begin, work.vector_begin);
  for (int64_t i = work.vector_begin + threadIdx.x * kGroup; i < work.vector_end; i += kThreads * kGroup) {
    Acc x[kGroup], y[kGroup];
    read_group(work.lang, work.lang_element, i, x);
    read_group(work.vis, work.vis_element, i, y);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) add(x[j], y[j]);
  }
  add_entries(work.vector_end, work.end);

  double sums[3] = {static_cast<double>(lang_lang), static_cast<double>(lang_vis), static_cast<double>(vis_vis)};
  block_sum(sums);
  if (threadIdx.x == 0)
    for (int i = 0; i < 3; ++i) parts[3 * static_cast<int64_t>(blockIdx.x) + i] = sums[i];
}

// One block.
template <class Out>
__global__ void __launch_bounds__(kThreads) sum_of_chunks(const double* parts, int64_t chunks, Out* result) {
  double sums[3] = {0.0, 0.0, 0.0};
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kThreads)
    for (int i = 0; i < 3; ++i) sums[i] += parts[3 * chunk + i];
  block_sum(sums);
  if (threadIdx.x == 0)
    for (int i = 0; i < 3; ++i) result[i] = static_cast<Out>(sums[i]);
}

}  // namespace vgs::cuda

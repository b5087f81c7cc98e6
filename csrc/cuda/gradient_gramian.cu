// CUDA implementation of gradient_gramian: checks, memory for the sums of the chunks, launches. The kernels are in
// gradient_gramian.cuh. Nothing here waits for the device.
#include "gradient_gramian.cuh"

#include <algorithm>
#include <vector>

#include "../gradient_lists.h"
#include "launch.h"

namespace vgs::cuda {
namespace {

using torch::headeronly::ScalarType;

Tensor inner_products(std::vector<Tensor> lang, std::vector<Tensor> vis, bool float64) {
  STD_TORCH_CHECK(!lang.empty(), "inner_products needs at least one pair of gradients");
  const torch::stable::accelerator::DeviceGuard guard(lang[0].get_device_index());
  const cudaStream_t stream = current_stream(lang[0]);
  const GradientLists lists(lang, vis, nullptr);
  const int64_t size = chunk_size(lists.pairs());
  int64_t chunks = 0;
  for (const GradientPair& pair : lists.pairs()) chunks += chunks_of(pair, size);

  const Tensor parts = torch::stable::new_empty(lang[0], {std::max<int64_t>(1, 3 * chunks)}, ScalarType::Double);
  double* const sums = static_cast<double*>(parts.mutable_data_ptr());
  for_each_table(lists.pairs(), [&](const Table& table, int blocks, int64_t first) {
    if (float64) chunk_products<double><<<blocks, kThreads, 0, stream>>>(table, sums + 3 * first);
    else chunk_products<float><<<blocks, kThreads, 0, stream>>>(table, sums + 3 * first);
    check_launch("chunk_products");
  });

  const Tensor result = torch::stable::new_empty(lang[0], {3}, float64 ? ScalarType::Double : ScalarType::Float);
  void* const to = result.mutable_data_ptr();
  if (float64) sum_of_chunks<<<1, kThreads, 0, stream>>>(sums, chunks, static_cast<double*>(to));
  else sum_of_chunks<<<1, kThreads, 0, stream>>>(sums, chunks, static_cast<float*>(to));
  check_launch("sum_of_chunks");
  return result;
}

}  // namespace
}  // namespace vgs::cuda

STABLE_TORCH_LIBRARY_IMPL(vgs_kernels_native, CUDA, m) {
  m.impl("inner_products", TORCH_BOX(&vgs::cuda::inner_products));
}

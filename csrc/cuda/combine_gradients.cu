// CUDA implementation of combine_gradients: checks and launches. The kernel is in combine_gradients.cuh. Nothing here
// waits for the device.
#include "combine_gradients.cuh"

#include <vector>

#include "../gradient_lists.h"
#include "launch.h"

namespace vgs::cuda {
namespace {

void combine(std::vector<Tensor> lang, std::vector<Tensor> vis, const Tensor& weights, std::vector<Tensor> out) {
  const Element element = element_of(weights, "weights");
  STD_TORCH_CHECK(weights.numel() == 2 && weights.is_contiguous() && (element == kFloat32 || element == kFloat64),
                  "weights must be two contiguous numbers of float32 or float64");
  const torch::stable::accelerator::DeviceGuard guard(weights.get_device_index());
  const cudaStream_t stream = current_stream(weights);
  GradientLists lists(lang, vis, &out);
  const void* const on_device = weights.const_data_ptr();
  for_each_table(lists.pairs(), [&](const Table& table, int blocks, int64_t) {
    if (element == kFloat64) combine_chunks<<<blocks, kThreads, 0, stream>>>(table, static_cast<const double*>(on_device));
    else combine_chunks<<<blocks, kThreads, 0, stream>>>(table, static_cast<const float*>(on_device));
    check_launch("combine_chunks");
  });
  lists.finish();
}

}  // namespace
}  // namespace vgs::cuda

STABLE_TORCH_LIBRARY_IMPL(vgs_kernels_native, CUDA, m) { m.impl("combine", TORCH_BOX(&vgs::cuda::combine)); }

// CPU implementation of combine_gradients: checks and threads. The loops over entries are in combine_gradients_kernels.h.
#include <cstring>
#include <vector>

#include "gradient_chunks.h"
#include "gradient_lists.h"
#include "kernels.h"

namespace vgs {
namespace {

constexpr int64_t kStreamingBytes = int64_t{32} << 20;  // of all results; above the second-level caches of a socket

void combine(std::vector<Tensor> lang, std::vector<Tensor> vis, const Tensor& weights, std::vector<Tensor> out) {
  const bool is_double = element_of(weights, "weights") == kFloat64;
  STD_TORCH_CHECK(weights.numel() == 2 && weights.is_contiguous() && (is_double || element_of(weights, "weights") == kFloat32),
                  "weights must be two contiguous numbers of float32 or float64");
  double weight[2];
  for (int i = 0; i < 2; ++i)
    weight[i] = is_double ? static_cast<const double*>(weights.const_data_ptr())[i]
                          : static_cast<const float*>(weights.const_data_ptr())[i];
  const CombineKernels& kernels = vgs::kernels().combine;
  GradientLists lists(lang, vis, &out);
  const Chunks chunks(lists.pairs());
  int64_t bytes = 0;
  for (const GradientPair& pair : lists.pairs()) bytes += pair.size * element_size(pair.out_element);
  const bool streaming = bytes > kStreamingBytes;
  chunks.for_each([&](int64_t, const Chunk& chunk) {
    const GradientPair& pair = *chunk.pair;
    char* target = static_cast<char*>(pair.out) + chunk.begin * element_size(pair.out_element);
    // A gradient of weight 0 is not read, so that inf and NaN in it cannot come through as 0 * inf.
    const void* a = weight[0] == 0.0 ? nullptr : entry(pair.lang, pair.lang_element, chunk.begin);
    const void* b = weight[1] == 0.0 ? nullptr : entry(pair.vis, pair.vis_element, chunk.begin);
    if (!a && !b) {
      std::memset(target, 0, (chunk.end - chunk.begin) * element_size(pair.out_element));
      return;
    }
    kernels.combine(a, pair.lang_element, weight[0], b, pair.vis_element, weight[1], target, pair.out_element,
                    chunk.end - chunk.begin, is_double, streaming);
  });
  lists.finish();
}

}  // namespace
}  // namespace vgs

STABLE_TORCH_LIBRARY_IMPL(vgs_kernels_native, CPU, m) { m.impl("combine", TORCH_BOX(&vgs::combine)); }

// CPU implementation of gradient_gramian: threads, and the sum of the chunks. The loops over entries are in
// gradient_gramian_kernels.h.
#include <vector>

#include "gradient_chunks.h"
#include "gradient_lists.h"
#include "kernels.h"

namespace vgs {
namespace {

struct Products {
  double sums[3] = {};
};

Products chunk_products(const GramianKernels& kernels, const Chunk& chunk, bool is_double) {
  const GradientPair& pair = *chunk.pair;
  const auto add = [&](const void* lang, Element lang_element, const void* vis, Element vis_element) {
    Products products;
    kernels.add_products(entry(lang, lang_element, chunk.begin), lang_element, entry(vis, vis_element, chunk.begin),
                         vis_element, chunk.end - chunk.begin, is_double, products.sums);
    return products;
  };
  if (pair.lang && pair.vis) return add(pair.lang, pair.lang_element, pair.vis, pair.vis_element);
  // Alone, a gradient is multiplied by itself; what belongs to the other one is zero.
  Products alone;
  if (pair.lang) alone.sums[0] = add(pair.lang, pair.lang_element, pair.lang, pair.lang_element).sums[0];
  if (pair.vis) alone.sums[2] = add(pair.vis, pair.vis_element, pair.vis, pair.vis_element).sums[2];
  return alone;
}

Tensor inner_products(std::vector<Tensor> lang, std::vector<Tensor> vis, bool float64) {
  STD_TORCH_CHECK(!lang.empty(), "inner_products needs at least one pair of gradients");
  const GramianKernels& kernels = vgs::kernels().gramian;
  const GradientLists lists(lang, vis, nullptr);
  const Chunks chunks(lists.pairs());
  std::vector<Products> parts(chunks.count());
  chunks.for_each([&](int64_t index, const Chunk& chunk) { parts[index] = chunk_products(kernels, chunk, float64); });
  Products total;
  for (const Products& part : parts)
    for (int i = 0; i < 3; ++i) total.sums[i] += part.sums[i];

  using torch::headeronly::ScalarType;
  Tensor result = torch::stable::new_empty(lang[0], {3}, float64 ? ScalarType::Double : ScalarType::Float);
  for (int i = 0; i < 3; ++i) {
    if (float64) static_cast<double*>(result.mutable_data_ptr())[i] = total.sums[i];
    else static_cast<float*>(result.mutable_data_ptr())[i] = static_cast<float>(total.sums[i]);
  }
  return result;
}

}  // namespace
}  // namespace vgs

STABLE_TORCH_LIBRARY_IMPL(vgs_kernels_native, CPU, m) { m.impl("inner_products", TORCH_BOX(&vgs::inner_products)); }

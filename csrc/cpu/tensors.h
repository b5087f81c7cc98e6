// What the launchers ask of torch's tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "element.h"

namespace vgs {

inline Element element_of(const torch::stable::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return kFloat32;
    case torch::headeronly::ScalarType::BFloat16: return kBFloat16;
    case torch::headeronly::ScalarType::Half: return kFloat16;
    case torch::headeronly::ScalarType::Double: return kFloat64;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
}

inline int64_t element_size(Element element) { return kElementSize[element]; }

// The entries of `indices`, each of which must be at least 0 and less than `size`.
inline const int64_t* checked_indices(const torch::stable::Tensor& indices, int64_t size) {
  STD_TORCH_CHECK(indices.is_contiguous() && indices.scalar_type() == torch::headeronly::ScalarType::Long,
                  "columns must be contiguous int64");
  const auto* index = static_cast<const int64_t*>(indices.data_ptr());
  for (int64_t k = 0; k < indices.numel(); ++k)
    STD_TORCH_CHECK(index[k] >= 0 && index[k] < size, "columns holds ", index[k], ", the vocabulary ", size);
  return index;
}

}  // namespace vgs

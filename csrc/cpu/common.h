// Shared by the CPU implementations: dtypes of tensors and the choice of the instruction-set level.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "decomposed_kl.h"

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

inline int64_t element_size(Element element) {
  return element == kFloat64 ? 8 : element == kFloat32 ? 4 : 2;
}

// 2 AVX-512, 1 AVX2 with FMA and F16C, 0 whatever the compiler targets by default.
int highest_level();

// The kernels of a level, of the highest one if `level` is negative. Raises where the CPU has no such level.
const Kernels& kernels_of_level(int64_t level);

}  // namespace vgs

// Dtypes of tensors, as the kernels know them. No torch headers and no library templates: see kernels.h.
#pragma once

#include <stdint.h>

namespace vgs {

enum Element { kFloat32, kBFloat16, kFloat16, kFloat64 };

constexpr int64_t kElementSize[] = {4, 2, 2, 8};  // bytes, by Element

}  // namespace vgs

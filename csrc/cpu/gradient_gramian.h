// What the launcher (gradient_gramian.cpp) and the kernels of every instruction-set level share. As in decomposed_kl.h,
// no library templates: this file is also compiled with -mavx512f.
#pragma once

#include "decomposed_kl.h"

namespace vgs {

struct GramianKernels {
  // Add <lang, lang>, <lang, vis>, <vis, vis> over n entries to `sums`. `is_double` asks for double lanes.
  void (*add_products)(const void* lang, Element lang_element, const void* vis, Element vis_element, int64_t n,
                       bool is_double, double sums[3]);
};

namespace baseline { extern const GramianKernels gramian_kernels; }
namespace avx2 { extern const GramianKernels gramian_kernels; }
namespace avx512 { extern const GramianKernels gramian_kernels; }

}  // namespace vgs

// What the launcher (gradient_gramian.cpp) and the kernels of every instruction-set level share. No library templates: see
// kernels.h.
#pragma once

#include "element.h"

namespace vgs {

struct GramianKernels {
  // Add <lang, lang>, <lang, vis>, <vis, vis> over n entries to `sums`. `is_double` asks for double lanes.
  void (*add_products)(const void* lang, Element lang_element, const void* vis, Element vis_element, int64_t n,
                       bool is_double, double sums[3]);
};

}  // namespace vgs

// What the launcher (combine_gradients.cpp) and the kernels of every instruction-set level share. No library templates: see
// kernels.h.
#pragma once

#include "element.h"

namespace vgs {

struct CombineKernels {
  // out[i] = lang_weight * lang[i] + vis_weight * vis[i] for n entries; lang or vis may be null, not both.
  // `streaming`: `out` is too large to be found in a cache by whoever reads it next.
  void (*combine)(const void* lang, Element lang_element, double lang_weight, const void* vis, Element vis_element,
                  double vis_weight, void* out, Element out_element, int64_t n, bool is_double, bool streaming);
};

}  // namespace vgs

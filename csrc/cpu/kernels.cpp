// All kernels of one instruction-set level: setup.py compiles this file once for each, with VGS_LEVEL its namespace.
#include "kernels.h"

#include "combine_gradients_kernels.h"
#include "gradient_gramian_kernels.h"
#include "products_kernels.h"
#include "stream_kl_kernels.h"

namespace vgs::VGS_LEVEL {
const Kernels kernels = {kProducts, kGramian, kCombine, kStreamKL};
}  // namespace vgs::VGS_LEVEL

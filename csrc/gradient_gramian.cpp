// Schema of the native backend of gradient_gramian. The launcher is vgs_kernels/gradient_gramian/native.py, the
// implementations are in cpu/ and cuda/; vgs_kernels/gradient_gramian/reference.py says what they compute.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(vgs_kernels_native, m) {
  // A tensor without entries stands for None. Returns <lang, lang>, <lang, vis>, <vis, vis>; shape (3,).
  m.def("inner_products(Tensor[] lang, Tensor[] vis, bool float64, int cpu_level) -> Tensor");
}

// Schema of the native backend of combine_gradients. The launcher is vgs_kernels/combine_gradients/native.py, the
// implementations are in cpu/ and cuda/; vgs_kernels/combine_gradients/reference.py says what they compute.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(vgs_kernels_native, m) {
  // A tensor without entries stands for None; an entry of `out` may be the tensor of `lang` or `vis` beside it.
  m.def("combine(Tensor[] lang, Tensor[] vis, Tensor weights, int cpu_level, Tensor(a!)[] out) -> ()");
}

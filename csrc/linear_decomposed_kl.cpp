// Schemas of the CPU helpers of linear_decomposed_kl. Called by products.py and column_filter.py of
// vgs_kernels/linear_decomposed_kl, implemented in cpu/linear_decomposed_kl.cpp.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(vgs_kernels_native, m) {
  m.def("transpose(Tensor input, Tensor(a!) out) -> ()");
  m.def("head_gradient(Tensor gradient, Tensor hidden, bool accumulate, int cpu_level, Tensor(a!) out) -> ()");
  m.def("hidden_gradient(Tensor gradient, Tensor weight, int cpu_level, Tensor(a!) out) -> ()");
  m.def("logits(Tensor hidden, Tensor weight, int cpu_level, Tensor(a!) out) -> ()");
  m.def("has_matrix_unit() -> bool");
  m.def("matrix_unit_logits(Tensor hidden, Tensor weight, Tensor(a!) out) -> ()");
  m.def("matrix_unit_hidden_gradient(Tensor gradient, Tensor weight, Tensor columns, Tensor(a!) out) -> ()");
  m.def("matrix_unit_head_gradient(Tensor gradient, Tensor hidden, Tensor columns, Tensor(a!) out) -> ()");
  m.def("gather_columns(Tensor matrix, Tensor columns, Tensor(a!) out) -> ()");
  m.def("select_columns(Tensor squares, float first, float second, Tensor(a!) columns) -> (int, int)");
}

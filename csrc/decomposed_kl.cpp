// Schemas of the native backend of decomposed_kl. The launcher is vgs_kernels/decomposed_kl/native.py, the
// implementations are in cpu/decomposed_kl.cpp; vgs_kernels/decomposed_kl/reference.py says what they compute.
//
// Outputs are arguments, so that the caller decides where they live: a gradient may overwrite the logits it came from.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(vgs_kernels_native, m) {
  m.def(
      "divergences(Tensor student, Tensor teacher, Tensor masked_teacher, Tensor? masked_student, "
      "Tensor? token_weights, int decomposition, int vocab_size, float temperature, float student_scale, "
      "float teacher_scale, float student_softcap, float teacher_softcap, int cpu_level, "
      "Tensor(a!) values, Tensor(b!) statistics) -> ()");
  m.def(
      "logit_gradients(Tensor student, Tensor teacher, Tensor masked_teacher, Tensor? masked_student, "
      "Tensor values, Tensor statistics, Tensor coefficients, Tensor? second_coefficients, "
      "int decomposition, int vocab_size, float temperature, float student_scale, float teacher_scale, "
      "float student_softcap, float teacher_softcap, int cpu_level, Tensor(a!) out_student, "
      "Tensor(b!)? out_masked_student, Tensor(c!)? out_second, Tensor(d!)? row_gramian, Tensor(e!)? column_squares) -> ()");
  m.def("cpu_level() -> int");
}

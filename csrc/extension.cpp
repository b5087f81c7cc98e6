// The Python module vgs_kernels._C: importing it registers the operators and their CPU kernels. Every schema is here, also
// of what vgs_kernels._C_cuda (cuda/module.cpp) implements for CUDA. The implementations are in
// cpu/ and cuda/, by the stem of the op, and vgs_kernels/<op>/reference.py says what they compute.
//
// Outputs are arguments, so that the caller decides where they live: a gradient may overwrite the logits it came from.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(vgs_kernels_native, m) {
  // stream_kl
  m.def(
      "stream_divergences(Tensor student, Tensor teacher, Tensor? masked_teacher, Tensor? masked_student, "
      "Tensor? token_weights, int vocab_size, float temperature, float student_scale, float teacher_scale, "
      "float student_softcap, float teacher_softcap, float ratio_bound, float ratio_floor, "
      "float teacher_smoothing, Tensor(a!) values, "
      "Tensor(b!) statistics) -> ()");
  m.def(
      "stream_gradients(Tensor student, Tensor teacher, Tensor? masked_teacher, Tensor? masked_student, Tensor values, "
      "Tensor statistics, Tensor coefficients, Tensor? second_coefficients, int vocab_size, float temperature, "
      "float student_scale, float teacher_scale, float student_softcap, float teacher_softcap, float ratio_bound, "
      "float ratio_floor, float teacher_smoothing, Tensor(a!) out, Tensor(b!)? out_second, Tensor(c!)? column_squares) -> ()");

  // products of a chunk of tokens with a head
  m.def("transpose(Tensor input, Tensor(a!) out) -> ()");
  m.def("logits(Tensor hidden, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("hidden_gradient(Tensor gradient, Tensor weight, Tensor(a!) out) -> ()");
  m.def(
      "head_gradient(Tensor gradient, Tensor hidden, bool accumulate, Tensor(a!) out, Tensor(b!)? remainder=None) -> ()");
  m.def("matrix_unit_hidden_gradient(Tensor gradient, Tensor weight, Tensor columns, Tensor(a!) out) -> ()");
  m.def("matrix_unit_head_gradient(Tensor gradient, Tensor hidden, Tensor columns, Tensor(a!) out) -> ()");

  // the columns of a logit gradient that are worth multiplying
  m.def("gather_columns(Tensor matrix, Tensor columns, Tensor(a!) out) -> ()");
  m.def("select_columns(Tensor squares, float first, float second, Tensor(a!) columns) -> (int, int)");

  // gradient_gramian. A tensor without entries stands for None. Returns <lang, lang>, <lang, vis>, <vis, vis>; shape (3,).
  m.def("inner_products(Tensor[] lang, Tensor[] vis, bool float64) -> Tensor");

  // combine_gradients. An entry of `out` may be the tensor of `lang` or `vis` beside it.
  m.def("combine(Tensor[] lang, Tensor[] vis, Tensor weights, Tensor(a!)[] out) -> ()");

  // Instruction-set level of the CPU kernels, a `Level` of cpu/kernels.h: the highest that runs here until it is set.
  m.def("cpu_level() -> int");
  m.def("highest_cpu_level() -> int");
  m.def("set_cpu_level(int level) -> ()");
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

// The Python module vgs_kernels._C_cuda: importing it registers the CUDA implementations of the operators whose schemas
// vgs_kernels._C has. Its attribute `architectures` names what it can run on, as nvcc was told: "sm_90.compute_120".
#include <Python.h>

#define VGS_TEXT(x) #x
#define VGS_TEXT_OF(x) VGS_TEXT(x)

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "architectures", VGS_TEXT_OF(VGS_CUDA_ARCHITECTURES)) == 0) return module;
  Py_XDECREF(module);
  return nullptr;
}

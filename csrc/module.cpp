// Makes the library an importable Python module, so that build tools and importlib find it. The operators register
// themselves with PyTorch's dispatcher when the library is loaded; nothing is bound to Python here.
#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", "Compiled kernels of mmvmamba.", -1, nullptr, nullptr, nullptr, nullptr, nullptr,
  };
  return PyModule_Create(&module);
}

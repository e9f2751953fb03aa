// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The Python module dcn_d2._C. The kernels register themselves with torch when the library is loaded.
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
